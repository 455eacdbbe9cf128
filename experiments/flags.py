"""The command line: flags in, one validated request out, or one line that says what is wrong.

Nothing here imports jax before everything that can be checked without it has been.
"""

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

if TYPE_CHECKING:
    from ..model.config import ModelConfig
    from ..model.train import Recipe

FORMATS = ("table", "json", "csv")
STEPS = ("train", "prefill", "decode", "generate", "score", "encode")
OBJECTIVES = ("tokens", "preference", "policy")
AUTO = "auto"
BATCH_AXES = ("data", "expert")  # of a mesh: what splits a batch
DEFAULT_CONTEXT = 4096

# What a flag is called, and the field of ModelConfig that it replaces.
SIZES = {
    "num_layers": ("num_layers", "L, layers"),
    "width": ("width", "D, model width"),
    "heads": ("num_heads", "N, query heads"),
    "kv_heads": ("num_kv_heads", "K, key/value heads"),
    "head_width": ("head_width", "H, head width; without it D / N, wherever --width or --heads is given"),
    "mlp_width": ("mlp_width", "F, feed-forward width"),
    "vocabulary": ("vocabulary", "V, vocabulary"),
}
RUNS = {
    "layers": "scan (one block, stacked weights), unroll (L blocks) or auto (scan to train, else unroll)",
    "remat": "what the backward pass computes again: none, full or dots",
    "attention": "how positions attend: xla, flash, cudnn (NVIDIA's, where it is installed), or auto (flash where the "
    "target has a kernel for it)",
    "activations": "int8: rounded to int8 for products with int8 weights, of more than one position; full: not",
}
DTYPES = {"bf16": "bfloat16", "f32": "float32"}  # what --dtype of a program says, and what it means
BF16 = "bf16"  # what --weights and --cache_dtype call the model's own type


class UsageError(Exception):
    """What is wrong with the command line, in one line that names the flag, its value and what is right."""


class _Count(flags.ArgumentParser[int]):
    """Whole numbers from 1 on."""

    syntactic_help = "a whole number of at least 1"

    def parse(self, argument: Any) -> int:
        if not re.fullmatch(r"\s*\+?\d[\d_]*\s*", str(argument)) or int(argument) < 1:
            raise ValueError(f"it must be {self.syntactic_help}")
        return int(argument)


class _OneOf(flags.ArgumentParser[str]):
    """One of a few words."""

    def __init__(self, choices: Sequence[str]):
        self.choices = choices
        self.syntactic_help = ", ".join(choices)

    def parse(self, argument: Any) -> str:
        if argument not in self.choices:
            raise ValueError(f"it must be one of {self.syntactic_help}")
        return argument


class _Mesh(flags.ArgumentParser[Any]):
    """`data=8,tensor=4` -> {"data": 8, "tensor": 4}; `auto` stays "auto"."""

    syntactic_help = "data=8,tensor=4 or auto"

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str) or argument == AUTO:
            return argument
        from ..profiling.targets import MESH_AXES

        sizes: dict[str, int] = {}
        for part in argument.split(","):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if not equals or not re.fullmatch(r"\d+", size) or int(size) < 1:
                raise ValueError("it must look like data=8,tensor=4 (sizes of at least 1), or be auto")
            if axis not in MESH_AXES:
                raise ValueError(f"{axis!r} is not an axis; the axes are data, expert and tensor")
            if axis in sizes:
                raise ValueError(f"{axis} is given twice")
            sizes[axis] = int(size)
        return sizes


class _Weights(flags.ArgumentParser[str]):
    """`bf16`, `int8`, or `int4:128`, which `int4` is short for."""

    syntactic_help = "bf16, int8, int4 or int4:GROUP"

    def parse(self, argument: Any) -> str:
        if not re.fullmatch(r"bf16|int8|int4(:[1-9]\d*)?", str(argument)):
            raise ValueError(f"it must be {self.syntactic_help}")
        return "int4:128" if argument == "int4" else argument


@dataclass(frozen=True)
class Request:
    """A validated command line.

    Attributes:
      config: the model, with how it runs; None for a dump and for the demo.
      batch: sequences over all chips; None: one (train: one a data shard).
      mesh: axis -> size; "auto": the smallest that fits; None: one chip.
      hlo: a dump to bill instead of a model. components: a table that names its parts, see names.Names.
      measure: whether to run it, too. trace: where to keep the trace of that; without `measure`, a trace to read.
      logdir: a folder for TensorBoard, made. tokens: how many `generate` writes.
      objective: what `train` is by, one of OBJECTIVES.
      given: the flags as they were given, for the record.
    """

    config: "ModelConfig | None"
    step: str
    context: int
    target: str
    batch: int | None = None
    mesh: dict[str, int] | str | None = None
    tokens: int = 64
    format: str = "table"
    hlo: Path | None = None
    components: dict[str, str] | None = None
    measure: bool = False
    trace: Path | None = None
    logdir: Path | None = None
    weights: str = "bf16"
    cache_dtype: str = "bf16"
    given: dict[str, Any] = field(default_factory=dict)
    objective: str = OBJECTIVES[0]

    @property
    def recipe(self) -> "Recipe":
        """How `train` trains."""
        from ..model.train import Recipe

        return Recipe(objective=self.objective)

    @property
    def is_demo(self) -> bool:
        """Nothing was asked for: show what there is."""
        return self.config is None and not self.is_dump

    @property
    def is_dump(self) -> bool:
        """What was asked for is a program, or a trace of one, that is there already."""
        return self.hlo is not None or (self.trace is not None and not self.measure)

    def batch_on(self, mesh: dict[str, int]) -> int:
        """The batch over all chips of `mesh`: as given, or one, or (train) one a data shard."""
        if self.batch is not None:
            return self.batch
        return batch_shards(mesh) if self.step == "train" else 1


class Definer:
    """Adds flags to `values`."""

    def __init__(self, values: flags.FlagValues):
        self.values = values

    def add(self, parser: flags.ArgumentParser[Any], name: str, default: Any, text: str) -> None:
        """A flag that `parser` reads."""
        flags.DEFINE(parser, name, default, text, flag_values=self.values, serializer=flags.ArgumentSerializer())

    def several(self, parser: flags.ArgumentParser[Any], name: str, text: str) -> None:
        """A flag that `parser` reads, as often as one likes: a list."""
        flags.DEFINE_multi(parser, flags.ArgumentSerializer(), name, [], text, flag_values=self.values)

    def count(self, name: str, default: int | None, text: str) -> None:
        """A whole number from 1 on."""
        self.add(_Count(), name, default, text)

    def one_of(self, choices: Sequence[str], name: str, default: str | None, text: str) -> None:
        """One of a few words."""
        self.add(_OneOf(choices), name, default, text)

    def string(self, name: str, default: str | None, text: str) -> None:
        """Any text."""
        flags.DEFINE_string(name, default, text, flag_values=self.values)

    def strings(self, name: str, text: str) -> None:
        """Any text, as often as one likes: a list."""
        flags.DEFINE_multi_string(name, [], text, flag_values=self.values)

    def number(self, name: str, default: float | None, text: str, low: float | None = None) -> None:
        """A number of at least `low`."""
        flags.DEFINE_float(name, default, text, lower_bound=low, flag_values=self.values)

    def integer(self, name: str, default: int | None, text: str, low: int | None = None) -> None:
        """A whole number of at least `low`."""
        flags.DEFINE_integer(name, default, text, lower_bound=low, flag_values=self.values)

    def boolean(self, name: str, text: str, short: str | None = None) -> None:
        """Given or not."""
        flags.DEFINE_bool(name, False, text, flag_values=self.values, short_name=short)


def define_model(to: Definer) -> None:
    """Adds the flags that say which model, its sizes and how it runs."""
    to.string("model", None, "which architecture (--list), or the path of a Hugging Face config.json. Default: nano")
    for name, (_, text) in SIZES.items():
        to.count(name, None, f"overrides {text}, of the model")
    for name, text in RUNS.items():
        to.string(name, None, text)
    to.string("dispatch", None, "how tokens meet experts: auto, all, blocks (dropless) or capacity (drops)")


def define_storage(to: Definer, several: bool = False) -> None:
    """Adds the flags that say in what weights (several: a list of ways) and the cache are stored."""
    text = "how weights are stored: bf16, int8 (a scale a channel) or int4[:group] (128)"
    if several:
        to.several(_Weights(), "weights", text + "; given several times, each")
    else:
        to.add(_Weights(), "weights", BF16, text)
    to.one_of((BF16, "int8"), "cache_dtype", BF16, "how the cache is stored: bf16, or int8 (a scale a position)")


def define(values: flags.FlagValues) -> None:
    """Adds every flag of `stepbill`."""
    to = Definer(values)
    define_model(to)
    programs = (
        "train, prefill, decode (one token), generate (--tokens), encode, or score (given tokens' log-probabilities)"
    )
    to.one_of(STEPS, "step", "decode", f"which program: {programs}")
    to.one_of(OBJECTIVES, "objective", OBJECTIVES[0], "to train by: tokens, preference (DPO) or policy (PPO, GRPO)")
    to.count("batch", None, "sequences, over all chips. Default: 1; to train, one for each data shard")
    positions = "in the cache (decode), the prompt (prefill), the sequence (train, score) or an encoder"
    to.count("context", None, f"positions {positions}")
    to.string("target", "host", "what to compile for: host, or a chip that need not be here; any other name lists them")
    to.add(_Mesh(), "mesh", None, "chips by axis, such as data=8,tensor=4; auto: the smallest mesh that fits")
    define_storage(to)
    to.count("tokens", 64, "how many tokens the generate step writes in its one dispatch")
    to.string("hlo", None, "bill this optimised HLO module instead of a model: text, .gz, or a folder XLA dumped to")
    to.boolean("measure", "run the step on this machine's device too, untraced and traced: measured time on the bill")
    to.string(
        "trace",
        None,
        "a trace of --hlo's program that jax.profiler wrote: a folder or *.xplane.pb; --hlo may be left out where "
        "--measure wrote it. With --measure: the folder to keep the trace in",
    )
    to.string(
        "components",
        None,
        "with --hlo: a file (JSON or TOML) of pattern -> component, to name parts by that have names of their own",
    )
    to.string(
        "compare",
        None,
        "bills side by side: variants with ; between, each flags (weights=int8), a dump or a saved bill",
    )
    to.one_of(FORMATS, "format", "table", "what standard output carries: table, json or csv")
    to.string("logdir", None, "a folder for TensorBoard, besides: scalars, hyperparameters, pictures, text, traces")
    to.boolean("list", "print every architecture, with its sizes, and stop")
    to.boolean("version", "print the version and stop")
    define_help(to)


def define_help(to: Definer) -> None:
    """Adds --help."""
    to.boolean("help", "print this and stop", short="h")


INTRODUCTION = """stepbill: an itemised bill for a compiled transformer step

  stepbill                                              a demonstration on this machine
  stepbill --model=llama3-8b --step=decode --batch=8 --context=4096 --target=h200
  stepbill --hlo=FILE --target=h200                     somebody else's program
  stepbill --model=small --step=prefill --measure       run here, too: where the time goes
  stepbill --trace=DIR --hlo=FILE --target=h200         a trace of another machine
  stepbill --compare="weights=bf16;weights=int8"        two bills side by side; also "a.json;b.json", "a.hlo;b.hlo"
"""


def usage(values: flags.FlagValues, introduction: str = INTRODUCTION) -> str:
    """What --help prints."""
    lines = [*introduction.splitlines(), ""]
    for name, flag in all_flags(values).items():
        default = "" if flag.default in (None, []) or flag.boolean else f" [{flag.default}]"
        lines.append(f"  --{name:<13} {flag.help}{default}")
    return "\n".join(lines)


def all_flags(values: flags.FlagValues) -> dict[str, flags.Flag[Any]]:
    """Every flag by its long name."""
    return {name: values[name] for name in values if len(name) > 1}


def parse(argv: Sequence[str], define: Callable[[flags.FlagValues], None] = define) -> flags.FlagValues:
    """Parses a command line (without the program's name); UsageError where it does not parse."""
    values = flags.FlagValues()
    define(values)
    try:
        rest = values(["stepbill", *argv])
    except flags.UnrecognizedFlagError as error:
        near = re.search(r"Did you mean: (.*) \?", str(error))
        tip = f"did you mean {', '.join('--' + name for name in near[1].split(', '))}?" if near else "see --help"
        raise UsageError(f"--{error.flagname}: there is no such flag; {tip}") from None
    except (flags.Error, ValueError) as error:
        message = str(error).removeprefix("flag ")
        if "Non-boolean argument" in message:
            message = f"--{message.partition(':')[0].lstrip('-')}: it takes no value"
        missing = re.fullmatch(r"Missing value for (?:flag )?-*(\w+)", message)
        raise UsageError(f"--{missing[1]}: it needs a value" if missing else _one_line(message)) from None
    if rest[1:]:
        raise UsageError(f"{rest[1]}: stray argument; everything is given by flags, such as --model=nano")
    return values


def request(values: flags.FlagValues) -> Request:
    """The validated request; UsageError names the flag that is wrong. Imports jax only if a model is asked for."""
    given = given_flags(values)
    about_demo = set(given) <= {"format"}
    _check_target(values.target)
    base = Request(
        None,
        values.step,
        values.context or DEFAULT_CONTEXT,
        values.target,
        values.batch,
        values.mesh,
        values.tokens,
        values.format,
        measure=values.measure,
        trace=None if values.trace is None else Path(values.trace),
        logdir=logdir(values.logdir),
        weights=values.weights,
        cache_dtype=values.cache_dtype,
        given=given,
        objective=values.objective,
    )
    if values.hlo is not None or base.is_dump:
        if alien := sorted(set(given) - {"hlo", "trace", "components", "target", "format"}):
            by = "--hlo" if values.hlo is not None else "--trace without --measure"
            raise UsageError(
                f"--{alien[0]}={given[alien[0]]}: it cannot be given with {by}, which is a program already"
            )
        path = None if values.hlo is None else _readable(values.hlo)
        return replace(base, hlo=path, components=_components(values.components))
    if values.components is not None:
        raise UsageError(f"--components={values.components}: it names parts of somebody else's program, given by --hlo")
    if about_demo:
        return base
    _check_mesh(base)
    if base.objective != OBJECTIVES[0] and base.step != "train":
        raise UsageError(f"--objective={base.objective}: it needs --step=train")
    return _with_model(base, values)


def given_flags(values: flags.FlagValues) -> dict[str, Any]:
    """The flags that were given, and their values. What to compare and where to log is no matter of any one bill."""
    given = {name: flag.value for name, flag in all_flags(values).items() if not flag.using_default_value}
    for of_all in ("compare", "logdir"):
        given.pop(of_all, None)
    return given


def model_config(values: flags.FlagValues, step: str) -> "ModelConfig":
    """The model that the flags of `define_model`, and of `define_storage` if they are there, ask for; UsageError."""
    from ..model import architectures

    sizes = {field: getattr(values, flag) for flag, (field, _) in SIZES.items() if getattr(values, flag) is not None}
    runs = {name: getattr(values, name) for name in RUNS if getattr(values, name) is not None}
    if sizes.keys() & {"width", "num_heads"} and "head_width" not in sizes:
        sizes["head_width"] = 0
    try:
        config = architectures.get(values.model or "nano")
        letters = {field: text[0] for field, text in SIZES.values()}
        if changed := [f"{letters[name]}={size}" for name, size in sizes.items() if size]:
            runs["name"] = f"{config.name}({','.join(changed)})"
        return replace(config, **sizes, **runs, **_stored(values, config, step))
    except ValueError as error:
        raise as_usage(error, given_flags(values)) from None


def _with_model(base: Request, values: flags.FlagValues) -> Request:
    config = model_config(values, base.step)
    context = values.context or min(DEFAULT_CONTEXT, config.max_context)
    if context > config.max_context:
        raise UsageError(f"--context={context}: {config.name} takes 1 to {config.max_context} positions")
    if base.step == "generate" and base.tokens > context:
        raise UsageError(f"--tokens={base.tokens}: a cache of --context={context} positions holds at most {context}")
    return replace(base, config=config, context=context)


def _stored(values: flags.FlagValues, config: "ModelConfig", step: str) -> dict[str, Any]:
    """What --weights, --cache_dtype and --dispatch change of a config; ValueError names the flag that is wrong."""
    changed: dict[str, Any] = {}
    for name in ("weights", "cache_dtype"):
        value = getattr(values, name) if name in values else BF16
        if value != BF16:
            if step == "train":
                raise ValueError(f"{name} is {value}; it must be {BF16} with --step=train")
            changed[name] = value
    if values.dispatch is not None:
        if config.experts is None:
            raise ValueError(f"dispatch is {values.dispatch}; {config.name} has no experts")
        changed["experts"] = replace(config.experts, dispatch=values.dispatch)
    return changed


def as_usage(error: Exception, given: Container[str] = ()) -> UsageError:
    """An error of the model or of a step, which says `field is value; what is right`, in terms of the flags.

    `given`: the flags of the command line. Where the field's own flag is not among them, one that the text names is.
    """
    names = {field: flag for flag, (field, _) in SIZES.items()}
    text = _one_line(str(error))
    found = re.fullmatch(r"(?:\w+\.)?(\w+) is (.+?); (.+)", text)
    if not found:
        return UsageError(text)
    field, value, right = found[1], found[2].strip("'"), found[3]
    right = re.sub(r"\b\w+\b", lambda word: f"--{names[word[0]]}" if word[0] in names else word[0], right)
    flag = names.get(field, field)
    if flag not in given and (other := re.search(r"--(\w+), (\d+)", right)) and other[1] in given:
        return UsageError(f"--{other[1]}={other[2]}: {flag} is {value}, and {right}")
    return UsageError(f"--{flag}={value}: {right}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _check_target(name: str) -> None:
    from ..profiling import targets

    try:
        targets.chip(name)
        targets.require(name)
    except ValueError as error:
        raise as_usage(error) from None
    except targets.MissingExtra as error:
        raise UsageError(f"--target={name}: {error}") from None


def _check_mesh(base: Request) -> None:
    if not isinstance(base.mesh, dict):
        return
    shards = batch_shards(base.mesh)
    if base.batch is not None and base.batch % shards:
        by = mesh_name({axis: base.mesh[axis] for axis in BATCH_AXES if base.mesh.get(axis, 1) > 1})
        raise UsageError(f"--batch={base.batch}: --mesh splits it over {by}, which must divide it")


def mesh_name(mesh: dict[str, int]) -> str:
    """`data=8,tensor=4`, as the flag takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def batch_shards(mesh: Mapping[str, int]) -> int:
    """How many parts of a batch are on different chips."""
    return math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)


def chips(mesh: dict[str, int]) -> int:
    """How many chips a mesh takes."""
    return math.prod(mesh.values())


def logdir(name: str | None) -> Path | None:
    """The folder of --logdir, made; UsageError where nothing could be written to it, or drawn."""
    if name is None:
        return None
    from ..profiling import tensorboard
    from .run_folder import check_writable

    folder = Path(name).expanduser()
    try:
        tensorboard.require()
    except tensorboard.MissingExtra as error:
        raise UsageError(f"--logdir={name}: {error}") from None
    check_writable(folder, "logdir")
    return folder


def _components(name: str | None) -> dict[str, str] | None:
    if name is None:
        return None
    from ..profiling import names

    try:
        return names.read_table(name)
    except names.TableError as error:
        raise UsageError(f"--components={name}: {_one_line(str(error))}") from None


def _readable(name: str) -> Path:
    path = Path(name)
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        raise UsageError(f"--hlo={name}: cannot read it: {(error.strerror or str(error)).lower()}") from None
    return path
