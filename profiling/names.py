"""Whose work a name says it is: the paths that frameworks write, and the table that reads them.

A path is what jax writes for an operation (`op_name`: scopes, modules, functions) or for an argument of the program
(`params['layers'][0]['attn']['q_proj']`). Linen writes a module's path, `Block_0/Mlp_0/Dense_1`; Haiku too,
`block_0/mlp/linear_1`; Equinox the classes of its layers, `eqx.nn.MLP/eqx.nn.Linear`; NNX and plain functions nothing,
but their arguments have names.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from ..model.scopes import COMPONENTS, PRODUCTS
from .harmless import visible

SOURCES = ("scope", "synonym", "argument", "inferred")
# A name may say the part and not which piece of it. Which one is told by the dataflow; if it is not, the row says that.
BARE = ("attention", "mlp", "moe", "norm")
NORMS = ("attention/norm", "mlp/norm", "moe/norm", "final_norm")

_ATTENTION = "attn|*attn|attention|*attention|mha|mqa|gqa"
_MLP = "*mlp|mlpblock|mlplayer|*ffn|ffnblock|*feedforward*|ff|densereludense|swiglu|geglu|glu"
_MOE = "moe|moeblock|*moe|*experts|mixtureofexperts"
_QKV = "q|k|v|query|key|value|kv|qkv|*down|*up|inproj"
_DENSE = "dense|linear|proj"
_IN = "w1|w3|wi|wi0|wi1|wup|wgate|gate|up|gateproj|upproj|gateupproj|fc1|fcin|fc|cfc|densein|densehto4h|intermediate"
_OUT = "w2|wo|wdown|down|downproj|fc2|fcout|cproj|denseout|dense4htoh|out|outproj|output|outputproj"

# Pattern -> component; of those that match the innermost name the first counts. A pattern is a path: its last part must
# be that name, the parts before it names further out, in this order, others in between. `|` is or, `*` any letters.
# Case, underscores and a number at the end do not count, unless the pattern has the number.
SYNONYMS: tuple[tuple[str, str], ...] = (
    # mixtures of experts, whose pieces are named like those of a plain mlp
    ("*sharedexpert*", "moe/shared"),
    (f"*sharedexpert*/{_IN}|{_OUT}", "moe/shared"),
    (f"{_MOE}/router*|gate|gating", "moe/router"),
    ("router|*router", "moe/router"),
    (f"{_MOE}/dispatch*|permute", "moe/dispatch"),
    (f"{_MOE}/combine*|unpermute", "moe/combine"),
    (f"{_MOE}/{_IN}|{_OUT}", "moe/experts"),
    ("expert|experts", "moe/experts"),
    # norms that say which one they are
    ("qnorm|knorm|querynorm|keynorm|qlayernorm|klayernorm", "attention/qkv"),
    ("ln1|norm1", "attention/norm"),
    ("lnattn|*attnnorm|*attentionnorm|attnln|preattention*norm|preattn*norm|selfattnlayernorm", "attention/norm"),
    ("preselfattentionlayernorm", "attention/norm"),
    ("inputlayernorm|inputnorm", "attention/norm"),
    ("ln2|norm2|lnmlp|mlpnorm|mlpln|ffnnorm|premlpnorm|premlplayernorm", "mlp/norm"),
    ("postattentionlayernorm|postselfattentionlayernorm|*feedforward*norm|*ffw*norm|*ffn*norm", "mlp/norm"),
    ("lnf|normf|*finalnorm|*finallayernorm|lnfinal|outputnorm|lastnorm", "final_norm"),
    ("encodernorm|decodernorm|encoderdecodernorm", "final_norm"),
    (f"{_ATTENTION}/*norm|ln", "attention/norm"),
    (f"{_MLP}/*norm|ln", "mlp/norm"),
    ("*norm|ln", "norm"),
    # attention
    ("rope|*rotary*|applyrope|ropeembedding", "attention/rope"),
    ("kvcache|updatecache|cacheupdate|updatekvcache", "attention/cache"),
    (f"{_ATTENTION}/cache", "attention/cache"),
    ("dotproductattention|flashattention|splashattention|ringattention|sdpa|scaleddotproduct*|fmha", "attention/core"),
    (f"{_ATTENTION}/core|softmax|scores|*logits|*probs|qk|pv|av", "attention/core"),
    (f"{_ATTENTION}/{_QKV}", "attention/qkv"),
    (f"{_ATTENTION}/{_QKV}/{_DENSE}", "attention/qkv"),
    (f"{_ATTENTION}/toq|tok|tov", "attention/qkv"),
    ("qeinsum|kveinsum|qkveinsum|*attnqkv", "attention/qkv"),
    ("wqa|wqb|wkva|wkvb|qaproj|qbproj|kvaproj*|kvbproj", "attention/qkv"),  # through a narrow vector, DeepSeek's
    (
        "wq|wk|wv|wqkv|wkv|wqdown|wkdown|qproj|kproj|vproj|kvproj|qkv|qkvproj|queryproj|keyproj|valueproj|cattn",
        "attention/qkv",
    ),
    (rf"{_ATTENTION}/({_DENSE})\d+", "attention"),  # each of its projections may be called so: Dense_0 to Dense_3
    (f"{_ATTENTION}/o|wo|cproj|{_DENSE}|{_OUT}", "attention/out"),
    (f"{_ATTENTION}/toout", "attention/out"),
    ("oproj|attnout|*attnproj|attnveceinsum", "attention/out"),
    (f"{_MLP}/{_OUT}", "mlp/down"),
    ("wo", "attention/out"),
    # feed-forward
    (f"{_MLP}/{_IN}", "mlp/up"),
    ("gateproj|upproj|gateupproj|gatingeinsum|w1|w3|wi|wup|wgate|cfc|fc1|fcin|densehto4h|intermediate", "mlp/up"),
    ("downproj|w2|wdown|fc2|fcout|dense4htoh", "mlp/down"),
    # the ends of the model
    ("lmhead|*unembed*|logits|*logitsdense|*logitdense|tologits|head|classifier|attend", "logits"),
    ("embedder/decode", "logits"),
    ("embedderdecode", "logits"),  # a scope of Tunix's models; so is embedder_encode
    (
        "wte|wpe|embed|embedding|embeddings|embedder|embedderencode|embedtokens|tokenembed*|tokembed*|wordembed*|"
        "patchembed*|pos*embed*",
        "embed",
    ),
    ("*loss|*lossfn|*crossentropy*|xent", "loss"),
    ("optimizer|*optimizer|adam|adamw|sgd|adafactor|applyupdates|applygradients", "optimizer"),
    ("sample|sampler|sampling", "sampling"),
    # a part, and not which piece
    (_ATTENTION, "attention"),
    (_MOE, "moe"),
    (_MLP, "mlp"),
)


class TableError(ValueError):
    """A user's table that cannot be read: what is wrong with it, in one line."""


class Name(NamedTuple):
    """What a path says. `component` may be one of BARE."""

    component: str
    source: str


class _Segment(NamedTuple):
    """One name of a path, lower case without underscores; a function's own name is no scope."""

    name: str
    base: str
    function: bool


class _Rule(NamedTuple):
    parts: tuple[re.Pattern[str], ...]
    component: str
    user: bool


def read_table(path: str | Path) -> dict[str, str]:
    """A user's table, a file of JSON or TOML (by its suffix): pattern -> component, those that come first count first.

    Raises:
      TableError: it cannot be read, or is no such table; says what and where.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TableError(f"cannot read it: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise TableError(f"not text: {error.reason} at byte {error.start}") from None
    try:
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise TableError(f"not {kind}: {visible(str(error))}") from None
    check_table(table)
    return table


def check_table(table: object) -> None:
    """TableError where `table` is not a mapping of patterns to components."""
    if not isinstance(table, Mapping):
        raise TableError(
            f'it must map patterns to components, as in {{"my_attn/q": "attention/qkv"}}, not {table!r:.40}'
        )
    for pattern, component in table.items():
        shown = visible(f"{pattern!r:.60}")
        if not isinstance(pattern, str) or not re.fullmatch(r"[\w|*]+(/[\w|*]+)*", pattern):
            raise TableError(f"pattern {shown}: it must be names with / between, such as my_attn/q|k|v or *_head")
        if not isinstance(component, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", component):
            raise TableError(
                f"pattern {shown} has component {visible(f'{component!r:.60}')}; it must be such as mlp/up"
            )


class Names:
    """Which component a path names.

    Args:
      components: a tuple: these scope names alone, whatever else the path says. A mapping: a user's table (as
        `read_table`), then all that None has. None: the project's scopes and SYNONYMS.
    """

    def __init__(self, components: tuple[str, ...] | Mapping[str, str] | None = None):
        self.scopes = components if isinstance(components, tuple) else COMPONENTS
        self.infers = not isinstance(components, tuple)
        self._rules: tuple[_Rule, ...] = ()
        self._argument_rules: tuple[_Rule, ...] = ()
        if self.infers:
            table: Mapping[str, str] = components if isinstance(components, Mapping) else {}
            check_table(table)
            user = tuple(_rule(pattern, component, user=True) for pattern, component in table.items())
            self._rules = (*user, *_default_rules())
            ours = [_rule(pattern, component) for pattern, component in PRODUCTS.items()]
            plain = [rule for rule in ours if len(rule.parts) == 1]
            self._argument_rules = (*user, *(one for one in ours if one not in plain), *_default_rules(), *plain)
        self._ending: dict[tuple[str, bool], list[_Rule]] = {}

    @property
    def order(self) -> tuple[str, ...]:
        """Components in the order of a bill."""
        return self.scopes

    def of_operation(self, name: str) -> Name | None:
        """What an op_name says, or one of those that `a;b` joins."""
        scope = _scope(name, self.scopes)
        if not self.infers:
            found = None
        elif scope is not None and ("/" in scope[0] or scope[0] == "optimizer"):
            found = self._find(_op_segments(name), self._rules, users_alone=True)
        else:
            found = self._find(_op_segments(name), self._rules, scope)
        if found is not None:
            return Name(found, "synonym")
        return None if scope is None else Name(scope[0], "scope")

    def of_argument(self, path: str) -> Name | None:
        """What the path of an argument says of what reads it."""
        found = self._find(argument_segments(path), self._argument_rules)
        return None if found is None else Name(found, "argument")

    def _find(
        self,
        path: tuple[_Segment, ...],
        rules: tuple[_Rule, ...],
        scope: tuple[str, int] | None = None,
        users_alone: bool = False,
    ) -> str | None:
        """The component of the innermost segment that has one; a user's table goes before all else. Of a norm that does
        not say which one it is, the innermost that does counts, as for a method's own name: attn_norm/attn_norm._norm.

        scope: one that the path holds, and at which segment; what lies further out says nothing.
        """
        arguments = rules is self._argument_rules
        best = None
        for at in range(len(path) - 1, -1, -1):
            segment = path[at]
            key = (segment.name, arguments)
            if key not in self._ending:
                self._ending[key] = [rule for rule in rules if _matches(rule.parts[-1], segment)]
            for rule in self._ending[key]:
                if not _outer(rule.parts[:-1], path[:at]):
                    continue
                if rule.user:
                    return rule.component
                plain = not users_alone and (scope is None or at > scope[1])
                more = best is None or (best == "norm" and rule.component in NORMS)
                if more and plain and (not segment.function or _may_be_function(rule.component)):
                    best = rule.component
        return best


@cache
def phase(op_name: str) -> str:
    """forward, backward or recompute, as an op_name path says; a rematerialised forward runs inside the backward's."""
    if "rematted_computation" in op_name:
        return "recompute"
    return "backward" if "transpose(" in op_name else "forward"


def _default_rules() -> tuple[_Rule, ...]:
    return tuple(_rule(pattern, component) for pattern, component in SYNONYMS)


def _rule(pattern: str, component: str, user: bool = False) -> _Rule:
    parts = [part.lower().replace("_", "").replace("*", r"\w*") for part in pattern.split("/")]
    return _Rule(tuple(re.compile(part) for part in parts), component, user)


def _matches(part: re.Pattern[str], segment: _Segment) -> bool:
    return bool(part.fullmatch(segment.name) or part.fullmatch(segment.base))


def _outer(parts: tuple[re.Pattern[str], ...], path: tuple[_Segment, ...]) -> bool:
    """Whether the segments of `path` match all of `parts`, in order."""
    left = len(parts)
    for segment in reversed(path):
        if left and _matches(parts[left - 1], segment):
            left -= 1
    return not left


def _may_be_function(component: str) -> bool:
    """Whether a jitted function's name may say so: jnp.linalg.norm is one, and a `loss` runs the whole model."""
    return component.partition("/")[0] in ("attention", "mlp", "moe")


# --- paths -----------------------------------------------------------------------------------------------------------

_FUNCTION = re.compile(r"\bp?jit\([^()]*\)")  # jit(loss) is a function's name, not a scope
_WRAPPER = re.compile(r"\b\w+\(|\)")  # jvp(attention/core) holds one
_ARGUMENT = re.compile(r"\w+(\.[A-Za-z_]|\[)")  # params['wq'], model.layers[0]
_SAYS_NOTHING = re.compile(
    # The last two are the class of every layer of Equinox's or Haliax's, whichever it is.
    r"jvp|transpose|vmap|checkpoint|rematted_computation|while|body|cond|closed_call|eqx\.nn\.Linear|Linear"
)
_BOXED = re.compile(r"(?<=\])\.(raw_)?value$")  # NNX: state['attn']['out']['kernel'].value


@cache
def _scope_pattern(scopes: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(scopes, key=len, reverse=True)
    return re.compile(r"(?<![^/])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![^/])")


def _scope(name: str, scopes: tuple[str, ...]) -> tuple[str, int] | None:
    """The innermost scope of a path (`loss/logits/dot_general` is logits), and its segment's number."""
    if not scopes:
        return None
    path = _WRAPPER.sub("/", _FUNCTION.sub("", name))
    found = None
    for match in _scope_pattern(scopes).finditer(path):
        found = match
    return None if found is None else (found[0], len(_op_segments(name, upto=found[0])) - 1)


@lru_cache(1 << 14)
def _op_segments(op_name: str, upto: str = "") -> tuple[_Segment, ...]:
    """The names of an op_name, outermost first, without the program's own and what jax writes around them.

    upto: those up to the last occurrence of this scope.
    """
    if _ARGUMENT.match(op_name):
        return ()
    names: list[tuple[str, bool]] = []
    for piece in re.split(r"(\bp?jit\([^()]*\))|[/()]", op_name):
        if piece and _FUNCTION.fullmatch(piece):
            names.append((piece.partition("(")[2][:-1], True))
        elif piece and not _SAYS_NOTHING.fullmatch(piece):
            names.append((piece, False))
    if names and names[0][1]:
        del names[0]  # the program itself
    if upto:
        last = max(n for n, (name, _) in enumerate(names) if name == upto.rpartition("/")[2])
        del names[last + 1 :]
    return tuple(_segment(name.rpartition(".")[2], function) for name, function in names)


@lru_cache(1 << 14)
def argument_segments(path: str) -> tuple[_Segment, ...]:
    """The names of an argument's path; an index belongs to the name before it."""
    names: list[str] = []
    for word in re.findall(r"\w+", _BOXED.sub("", path)):
        if word.isdigit() and names:
            names[-1] += "_" + word
        else:
            names.append(word)
    return tuple(_segment(name, False) for name in names)


def _segment(name: str, function: bool) -> _Segment:
    plain = name.lower().replace("_", "")
    return _Segment(plain, plain.rstrip("0123456789") or plain, function)
