"""The `stepbill` command: flags in, one bill out."""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..profiling import calibration, closed_form, dumps, hlo, price, reconcile, render, targets, tensorboard, trace
from ..profiling.bill import Bill
from ..profiling.names import Names
from ..profiling.walk import Kernel, itemize_module
from . import command, fit, flags
from .command import Say
from .fit import Mesh
from .flags import Request, UsageError

if TYPE_CHECKING:
    from ..model.encoder_config import EncoderConfig
    from .steps import Step

GIVEN_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


class DoesNotFit(Exception):
    """What the step needs on each chip of this mesh, and whether the compiler said so or the arguments alone do."""

    def __init__(self, needs_bytes: int, compiled: bool):
        self.needs_bytes, self.compiled = needs_bytes, compiled
        super().__init__(f"needs {needs_bytes} bytes a chip")


# --- from a request to a bill --------------------------------------------------------------------------------------


def bill_step(request: Request, say: Say = lambda _: None) -> Bill:
    """The bill of what was asked for; UsageError where it cannot be had. `say` is told what is going on."""
    if request.is_dump:
        return _bill_dump(request)
    assert request.config is not None, "the demonstration has more than one bill"
    mesh = request.mesh if isinstance(request.mesh, dict) else {}
    try:
        targets.prepare(request.target, flags.chips(mesh))
    except targets.MissingExtra as error:
        raise UsageError(f"--target={request.target}: {error}") from None
    except ValueError as error:
        raise UsageError(f"--mesh={flags.mesh_name(mesh)}: {error}") from None
    compiler = _Compiler(request, say)
    if request.mesh == flags.AUTO:
        found = compiler.smallest()
        if found is None:
            raise UsageError(
                f"--mesh=auto: {compiler.what()} fits on no mesh of up to {fit.MOST_CHIPS} {request.target}"
            )
        mesh = found.mesh
    try:
        step, compilation = compiler(mesh)
    except DoesNotFit as error:
        raise UsageError(compiler.refusal(mesh, error)) from None
    traced, says = None, None
    with tempfile.TemporaryDirectory() as scratch:
        if request.measure:
            folder = request.trace or Path(scratch)
            step, compilation, traced, says = _measure(request, mesh, compilation, folder, say)
        say("reading the compiled program")
        bill = bill_of(step, compilation, request.target, mesh, request.tokens, traced, says)
        bill.program["flags"] = {name: str(value) for name, value in request.given.items()}
        if traced:
            _keep_trace(request, bill, traced, compilation.text)
    return bill


def _measure(
    request: Request, mesh: Mesh, compilation: targets.Compilation, folder: Path, say: Say
) -> "tuple[Step, targets.Compilation, trace.Trace, dict[str, Any]]":
    """Runs the step that was compiled: it, the program that was traced, the trace, and what `trace.facts` needs."""
    import jax

    from . import measure, steps

    if not targets.present(request.target, flags.chips(mesh)):
        here = targets.here()
        raise UsageError(
            f"--measure: there is no {flags.chips(mesh)} x {targets.chip(request.target).title} at hand to run "
            f"--target={request.target} on; --target={here} is this machine"
        )
    assert request.config is not None
    say(f"making the arguments of {request.step}")
    place = targets.mesh(request.target, mesh)
    if place.size == 1 and place.devices.flat[0] == jax.devices()[0]:
        # They are made there anyway; and jax 0.10 does not take its own arrays of int4 where it was told their place.
        place = None
    step = steps.build(
        request.config,
        request.step,
        batch=request.batch_on(mesh),
        context=request.context,
        mesh=place,
        count=request.tokens,
        recipe=request.recipe,
        real=True,
    )
    platform = targets.chip(request.target).platform
    at_hand = compilation if measure.options(step, platform) == step.compiler_options(platform) else None
    try:
        programs = measure.Programs(step, request.target, at_hand, say)
        found = measure.measure(step, request.target, folder, programs=programs, say=say)
        traced = found.traced
    except trace.TraceError as error:
        raise UsageError(f"--measure: it ran, but cannot be traced: {error}") from None
    except ValueError as error:
        if "input layouts" not in str(error):
            raise
        raise UsageError(
            f"--measure: jax {metadata.version('jax')} does not take its own arrays of {request.weights} where several "
            f"devices share them; newer ones do"
        ) from None
    assert traced is not None
    return found.step, found.compilation, traced, found.says


def _keep_trace(request: Request, bill: Bill, traced: trace.Trace, module: hlo.Module | str) -> None:
    """The trace of a module, which may be text still, beside its bill in --logdir; nothing without one."""
    if request.logdir:
        module = hlo.parse(module) if isinstance(module, str) else module
        with _written(request.logdir):
            tensorboard.keep_trace(request.logdir, bill.program, traced, module, Names(request.components))


class _Compiler:
    """Compiles the requested step on one mesh or another, each once."""

    def __init__(self, request: Request, say: Say):
        self.request, self.say = request, say
        self.capacity = targets.chip(request.target).usable_hbm_bytes
        self._done: dict[str, tuple[Step, targets.Compilation] | DoesNotFit] = {}

    def __call__(self, mesh: Mesh) -> "tuple[Step, targets.Compilation]":
        """The step and its compiled program; DoesNotFit where they need more memory than there is."""
        key = flags.mesh_name(mesh)
        if key not in self._done:
            try:
                self._done[key] = self._compile(mesh)
            except targets.DoesNotFit as error:
                self._done[key] = DoesNotFit(error.needs_bytes, compiled=True)
            except DoesNotFit as error:
                self._done[key] = error
        done = self._done[key]
        if isinstance(done, DoesNotFit):
            raise done
        return done

    def _compile(self, mesh: Mesh) -> "tuple[Step, targets.Compilation]":
        from . import steps

        request, config = self.request, self.request.config
        assert config is not None
        batch = request.batch_on(mesh)
        if self.capacity:
            # A program whose arguments alone are too large need not be compiled, which can take minutes.
            least = fit.estimate(config, request.step, batch, request.context, mesh)
            if least > self.capacity:
                raise DoesNotFit(least, compiled=False)
        self.say(f"tracing {self.what()}")
        try:
            made = steps.build(
                config,
                request.step,
                batch=batch,
                context=request.context,
                mesh=targets.mesh(request.target, mesh),
                count=request.tokens,
                recipe=request.recipe,
            )
            start = time.perf_counter()
            lowered = made.lower()
        except ValueError as error:
            raise flags.as_usage(error, request.given) from None
        lower_seconds = time.perf_counter() - start
        self.say(f"compiling {self.what()} for {flags.chips(mesh)} x {request.target}")
        options = made.compiler_options(targets.chip(request.target).platform)
        compilation = targets.compile(lowered, request.target, options=options, runs=request.measure)
        return made, replace(compilation, lower_seconds=lower_seconds)

    def smallest(self) -> fit.Fit | None:
        """The smallest mesh that fits; one chip where nobody knows what a chip holds."""
        request, config = self.request, self.request.config
        assert config is not None
        if not self.capacity:
            return fit.Fit({}, 0, confirmed=False)

        learned = 0.0  # bytes beyond the estimate, for each sequence on a chip that is not split over `tensor`

        def rows(mesh: Mesh) -> float:
            return max(1, request.batch_on(mesh) // flags.batch_shards(mesh)) / mesh.get("tensor", 1)

        def estimated(mesh: Mesh) -> int:
            least = fit.estimate(config, request.step, request.batch_on(mesh), request.context, mesh)
            return least + int(learned * rows(mesh) / 2)  # half, so as not to pass over a mesh that would do

        def compiled(mesh: Mesh) -> int | None:
            nonlocal learned
            least = fit.estimate(config, request.step, request.batch_on(mesh), request.context, mesh)
            try:
                _, compilation = self(mesh)
            except DoesNotFit as error:
                learned = max(learned, (error.needs_bytes - least) / rows(mesh))
                return None
            return compilation.memory.needed if compilation.memory else 0

        return fit.smallest(
            fit.candidates(config, request.step, request.batch), estimated, compiled, self.capacity
        )  # fmt: skip

    def what(self) -> str:
        """`llama3-8b decode`."""
        assert self.request.config is not None
        return f"{self.request.config.name} {self.request.step}"

    def refusal(self, mesh: Mesh, error: DoesNotFit) -> str:
        """One line: what it needs, what the chip has, and what would do."""
        assert self.capacity is not None
        needs = "needs" if error.compiled else "needs at least"
        flag = f"--mesh={flags.mesh_name(mesh)}" if mesh else f"--target={self.request.target}"
        text = (
            f"{flag}: {self.what()} does not fit: it {needs} {render.amount(error.needs_bytes, 'B', 4)} a chip, "
            f"{self.request.target} has {render.amount(self.capacity, 'B', 4)}; "
        )
        found = self.smallest()
        if found is None:
            text += f"no mesh of up to {fit.MOST_CHIPS} chips will do"
        else:
            sure = "compiled to make sure" if found.confirmed else "by estimate, not compiled"
            mesh_flag = f"--mesh={flags.mesh_name(found.mesh)}" if found.mesh else "one chip, without --mesh"
            text += f"the smallest mesh that fits is {mesh_flag} ({sure})"
        config = self.request.config
        if self.request.step == "train" and config is not None and config.remat != "full":
            text += "; --remat=full needs less"
        return text


def bill_of(
    step: "Step",
    compilation: targets.Compilation,
    target: str,
    mesh: Mesh | None = None,
    tokens: int = 1,
    traced: trace.Trace | None = None,
    says: Mapping[str, Any] | None = None,
) -> Bill:
    """The bill of a compiled step of our own, held against the closed form and XLA's totals, with its price.

    tokens: how many a `generate` step writes.
    traced: a trace that has executions of it, from which its rows get measured time; says: see trace.facts.
    """
    chip, mesh = targets.chip(target), mesh or {}
    module = hlo.parse(compilation.text)
    executions = traced.executions(module) if traced else []
    kernels: list[Kernel] = []
    rates = _calibration(chip)
    bill = itemize_module(
        module,
        chip,
        roles=step.argument_roles,
        masked=step.masked,
        program=_about(step, target, mesh),
        plan=compilation.memory,
        kernels=kernels,
        measured=trace.typical(executions).spent.by_name if executions else None,
        calibration=rates,
    )
    bill.notes[:0] = [compilation.how, *_by(rates)]
    if step.config.experts is not None:
        bill.program["experts"] = _about_experts(step, bill, mesh, tokens)
    _against_closed_form(bill, step, mesh, tokens)
    reconcile.against_xla(bill, module, kernels, chip.platform, compilation.xla)
    handled = {"decode": 1, "generate": tokens}
    encoder = _encoder(step)
    each = encoder.tokens(step.context) if encoder else handled.get(step.name, step.context)
    bill.price = price.of_run(chip, bill.program["chips"], bill.total.seconds or None, step.batch * each)
    if step.name == "generate":
        bill.program["tokens"] = tokens
    if traced:
        _set_measured(bill, traced, executions, _with_peaks(chip, rates), says)
    return bill


def _calibration(chip: targets.Chip) -> calibration.Calibration | None:
    """What such a chip was measured to do, where this user has saved that; UsageError where the file is no such."""
    try:
        return calibration.of(chip)
    except calibration.CalibrationError as error:
        raise UsageError(f"{error}; {calibration.COMMAND} writes it anew") from None


def _with_peaks(chip: targets.Chip, rates: calibration.Calibration | None) -> targets.Chip:
    """The chip with its datasheet's peaks or, of a host, which has none, with the highest rates measured on it."""
    return rates.fastest(chip) if rates is not None and not chip.peak_flops else chip


def _by(rates: calibration.Calibration | None) -> list[str]:
    """A note on measured rates, if there are any."""
    if rates is None:
        return []
    return [f"times by what this {rates.hardware.device} was measured to do on {rates.date[:10]} (jax {rates.jax})"]


def _set_measured(
    bill: Bill,
    traced: trace.Trace,
    executions: Sequence[trace.Execution],
    chip: targets.Chip,
    says: Mapping[str, Any] | None,
) -> None:
    bill.measured = trace.facts(bill, executions, chip, says)
    bill.notes += traced.notes
    lost = trace.typical(executions).unjoined
    if lost and traced.lost_names():
        bill.notes.append(
            f"{len(lost)} kernels of the trace say no instruction, as they do inside command buffers: traced with "
            f"{trace.NO_COMMAND_BUFFERS} they do"
        )


def _about(step: "Step", target: str, mesh: Mesh) -> dict[str, Any]:
    config = step.config
    return {
        "model": config.name,
        "parameters": config.parameters,
        "active_parameters": config.active_parameters,
        "step": step.name,
        **({} if step.recipe.objective == "tokens" else {"objective": step.recipe.objective}),
        "batch": step.batch,
        "context": step.context,
        "weights": _given(config.param_dtype if config.weights == "full" else config.weights),
        "cache_dtype": _given(config.dtype if config.cache_dtype == "full" else config.cache_dtype),
        "target": target,
        "chips": flags.chips(mesh),
        "mesh": mesh,
        "layers": config.layers,
        "remat": config.remat,
        "attention": config.attention,
        "jax": metadata.version("jax"),
        "flags": {},
    }


def _given(dtype: str) -> str:
    """A type as the flags call it."""
    return GIVEN_TYPES.get(dtype, dtype)


def _about_experts(step: "Step", bill: Bill, mesh: Mesh, tokens: int) -> dict[str, Any]:
    """What is routed to experts and what they compute and read, as the compiled program does it; per chip.

    Bytes of an inference step: those of the experts that its tokens ask for, each once, and what is read of experts in
    all, taxes included.
    """
    config, work = step.config, bill.component("moe/experts")
    experts = config.experts
    assert experts is not None
    wasted = [row.work.matmul for row in bill.rows if row.component == "moe/experts" and row.tax == "masked"]
    executed, routed = work.matmul, work.matmul - sum(wasted)
    about: dict[str, Any] = {"count": experts.count, "active": experts.active, "dispatch": step.dispatch}
    if not routed:
        return about
    about |= {"routed_flops": routed, "executed_flops": executed, "executed_over_routed": round(executed / routed, 4)}
    note = (
        f"experts: {experts.active} of {experts.count} a token, dispatch {step.dispatch}; they execute "
        f"{executed / routed:.2f} times the FLOPs that are routed to them"
    )
    if step.name != "train":
        element_bytes = 4 if config.dtype == "float32" else 2
        asked = closed_form.experts_bytes(config, step.tokens_among_experts, element_bytes)
        asked //= mesh.get("tensor", 1) * step.expert_chips
        asked *= tokens if step.name == "generate" else 1
        read = work.hbm_read.get("weights", 0)
        about |= {"routed_bytes": asked, "read_bytes": read, "read_over_routed": round(read / asked, 4)}
        note += f" and read {read / asked:.2f} times the bytes of those that can be asked for"
    bill.notes.append(note)
    return about


def _against_closed_form(bill: Bill, step: "Step", mesh: Mesh, tokens: int) -> None:
    """Per chip, were every product, weight and cache split evenly; what the rules of axes.py replicate is a reason."""
    config, chips, tensor = step.config, flags.chips(mesh), mesh.get("tensor", 1)
    times = tokens if step.name == "generate" else 1  # as many decode steps
    name = "decode" if step.name == "generate" else step.name
    sizes = (name, step.batch, step.context)
    element_bytes = 4 if config.dtype == "float32" else 2
    asked = step.batch * (1 if name == "decode" else step.context)

    def amounts(tensor: int) -> reconcile.Expected:
        """Per chip, if what `tensor` chips cannot share counts for each of them."""
        weights = closed_form.weights_bytes(config, config.parameters, asked, element_bytes, tensor, step.expert_chips)
        weights *= times
        if encoder := _encoder(step):
            flops = closed_form.encoder_flops(encoder, step.batch, step.context, step.score_blocks, tensor)
            ideal = closed_form.encoder_flops(encoder, step.batch, step.context, tensor=tensor, ideal=True)
            matmul = {part: n // chips for part, n in flops.items()}
            return reconcile.Expected(matmul, sum(ideal.values()) // chips, weights // mesh.get("tensor", 1))
        matmul = closed_form.matmul_flops(config, *sizes, step.expert_rows, step.score_blocks, tensor)
        matmul = {part: n * times // chips for part, n in matmul.items()}
        ideal = int(Fraction(closed_form.ideal_flops(config, *sizes, tensor) * times, chips))
        if name == "train":
            return reconcile.Expected(matmul, ideal)
        cache = closed_form.cache_bytes(config, *sizes, element_bytes, tensor)
        read, write = (n * times // chips for n in cache)
        return reconcile.Expected(matmul, ideal, weights // mesh.get("tensor", 1), read, write)

    even = amounts(1)
    bill.ideal_flops = even.ideal_flops
    reconcile.against_closed_form(bill, even, amounts(tensor), f"not split over tensor={tensor}")


def _encoder(step: "Step") -> "EncoderConfig | None":
    """Its config, if the step is one of an encoder."""
    from ..model.encoder_config import EncoderConfig

    return step.config if isinstance(step.config, EncoderConfig) else None


def _bill_dump(request: Request) -> Bill:
    """The bill of a dump; with a trace, what that says of it."""
    traced, path, says = _read_trace(request)
    try:
        found = dumps.find(path)
        with hlo.collection_paused():
            module = hlo.parse(dumps.read(found.path))
            program = {"model": found.path.name, "target": request.target, "chips": module.num_partitions, "mesh": {}}
            program["flags"] = {name: str(value) for name, value in request.given.items()}
            chip = targets.chip(request.target)
            executions = traced.executions(module) if traced else []
            measured = trace.typical(executions).spent.by_name if executions else None
            rates = _calibration(chip)
            options = {"components": request.components, "program": program, "calibration": rates}
            bill = itemize_module(module, chip, measured=measured, **options)
            bill.price = price.of_run(chip, module.num_partitions, bill.total.seconds or None)
    except hlo.HloError as error:
        raise UsageError(f"--hlo={path}: not a dump of an optimised HLO module: {_first_line(error)}") from None
    except trace.TraceError as error:
        raise UsageError(f"--trace={request.trace}: {error}") from None
    if found.note:
        bill.notes.append(found.note)
    ran = executions[0].device.partition(":")[0] if executions else None
    if ran not in (None, {"cuda": "gpu"}.get(chip.platform, chip.platform)):
        bill.notes.append(
            f"the trace is of a {ran.upper()} and {request.target} is none: give --target, whose peaks and prices apply"
        )
    host = "; traffic of a CPU's memory is no proxy for HBM" if request.target == "host" else ""
    bill.notes += [f"read from a dump, taken to be compiled for {request.target}{host}", *_by(rates)]
    if traced:
        _set_measured(bill, traced, executions, _with_peaks(chip, rates), says)
        _keep_trace(request, bill, traced, module)
    return bill


def _read_trace(request: Request) -> tuple[trace.Trace | None, Path, dict[str, Any]]:
    """The trace that was asked for, if any; where the HLO is; and what was saved with them."""
    if request.trace is None:
        assert request.hlo is not None
        return None, request.hlo, {}
    from .measure import HLO_SUFFIX, saved

    try:
        traced = trace.read(request.trace)
    except trace.TraceError as error:
        raise UsageError(f"--trace={request.trace}: {error}") from None
    text, says = saved(traced)
    if (path := request.hlo or text) is None:
        raise UsageError(
            f"--trace={request.trace}: it needs the program's optimised HLO too, by --hlo=FILE: {traced.path.parent} "
            f"does not hold one *{HLO_SUFFIX}, as --measure saves it"
        )
    return traced, path, says


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `stepbill`: 0; 2 where the flags are wrong or the step does not fit; 1 where a compiler failed."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        values = flags.parse(argv)
        if values.help:
            print(flags.usage(values))
        elif values.version:
            print(f"stepbill {metadata.version('stepbill')}")
        elif values.list:
            _list(values.format)
        elif values.compare is not None:
            _compare(argv, values.compare, values.format, flags.logdir(values.logdir))
        else:
            request = flags.request(values)
            _demonstrate(request) if request.is_demo else _print(request)
    except UsageError as error:
        print(f"stepbill: {error}", file=sys.stderr)
        return 2
    except targets.CompileError as error:
        print(f"stepbill: the compiler gave up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `stepbill | head`
        sys.stderr.close()
        return 0
    return 0


def _print(request: Request) -> None:
    with command.status() as say:
        bill = bill_step(request, say)
    if request.format == "json":
        print(json.dumps(bill.to_json(), indent=1))
    elif request.format == "csv":
        sys.stdout.write(render.to_csv(bill))
    else:
        print_table(bill)
    sys.stdout.flush()
    _log(request.logdir, lambda logdir: tensorboard.write(logdir, [tensorboard.Run(bill)]))


def _log(logdir: Path | None, write: Callable[[Path], object]) -> None:
    """Writes to the log folder, if there is one, and says on standard error how to look at it."""
    if logdir is None:
        return
    with _written(logdir):
        write(logdir)
    print(f"to look at it: tensorboard --logdir={shlex.quote(str(logdir))}", file=sys.stderr)


@contextmanager
def _written(logdir: Path) -> Iterator[None]:
    """UsageError where nothing can be written to the log folder after all."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"--logdir={logdir}: cannot write there: {error.strerror or error}") from None


def print_table(bill: Bill) -> None:
    """The bill on standard output: as wide as the terminal and in colour, if it is one."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False, emoji=False)
        console.print(render.renderable(bill, console.width))
    else:
        sys.stdout.write(render.to_text(bill))


def _list(form: str) -> None:
    """Every architecture, with its sizes."""
    from ..model.architectures import ARCHITECTURES, ENCODERS

    rows = [
        {
            "name": config.name,
            "parameters": config.parameters,
            "active_parameters": config.active_parameters,
            **{"L": config.num_layers, "D": config.width, "N": config.num_heads, "K": config.num_kv_heads},
            **{"H": config.head_width, "F": config.mlp_width, "V": config.vocabulary},
            "max_context": config.max_context,
            "variant": config.variant,
        }
        for config in (*ARCHITECTURES.values(), *ENCODERS.values())
    ]
    if form == "json":
        print(json.dumps({"schema": 1, "architectures": rows}, indent=1))
    else:
        sys.stdout.write(render.columns(rows, separated="," if form == "csv" else None))


def _compare(argv: Sequence[str], variants: str, form: str, logdir: Path | None) -> None:
    from . import compare

    with command.status() as say:
        comparison = compare.compare(argv, variants, say)
    compare.show(comparison, form)
    _log(logdir, lambda logdir: tensorboard.write_comparison(logdir, comparison))


def _demonstrate(request: Request) -> None:
    from . import demo

    done = demo.main(request.format, partial(_keep_trace, request))
    runs = [tensorboard.Run(one.bill, more=one.rates) for one in done]
    _log(request.logdir, lambda logdir: tensorboard.write(logdir, runs))


if __name__ == "__main__":
    sys.exit(main())
