"""Where each canonical tensor lies in a stored checkpoint: a pure mapping without I/O.

    layout              names                      Linear     experts             attention
    hub (-PT)           model.*, vision_model.*    [out, in]  one by one          q, k, v
    transformers        model.language_model.*     [out, in]  stacked, gate|up    q, k, v
    -Paddle             ernie.*                    [in, out]  fused gate|up       fused q|k|v
    -Paddle, unfused    model.*                    [in, out]  one by one          q, k, v

The names alone tell the first three apart; -Paddle's transposed Linears show only in the shape of
a tensor that is not square.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from chiasm.errors import InvalidArgument, NotFound
from chiasm.model.config import ModelConfig, TextConfig
from chiasm.model.shapes import Shape, tensor_shapes
from chiasm.types import Modality

_LINEAR = re.compile(
    r"(_proj|\.qkv|\.proj|\.fc[12]|_linear\.[02]|resampler_model\.mlp|lm_head)\.weight$"
)
_QKV = re.compile(r"(?P<prefix>.*self_attn\.)(?P<part>[qkv])_proj\.weight$")
_SWIGLU = re.compile(r"(?P<prefix>.*mlp\..*?)(?P<part>gate|up|gate_up)_proj\.weight$")
_EXPERT = re.compile(
    r"(?P<prefix>model\.layers\.\d+\.mlp\.)experts\.(?P<expert>\d+)\.(?P<part>\w+)_proj\.weight$"
)
_VISION, _RESAMPLER, _TEXT = "vision_model.", "model.resampler_model.", "model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A region of one stored tensor."""

    key: str
    shape: Shape
    """Shape that the whole stored tensor must have."""
    expert: int | None = None
    """Index on the leading axis of a stack of experts."""
    rows: range | None = None
    """Rows wanted, counted after transposing; None is all."""
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How one checkpoint stores its tensors; see the module's table."""

    text: TextConfig
    shapes: dict[str, Shape]
    """Canonical shapes, of `tensor_shapes`."""
    text_prefix: str
    vision_prefix: str
    resampler_prefix: str
    is_native: bool
    """transformers' own names: experts of a bank stacked in one tensor, routers [E, H]."""
    has_fused_qkv: bool
    has_fused_swiglu: bool
    is_transposed: bool

    def pieces(self, name: str) -> list[Piece]:
        """Regions that make up a canonical tensor, concatenated along its first axis.

        Besides the canonical names, `..gate_up_proj.weight` means the rows of gate_proj followed
        by those of up_proj. Raises NotFound for a name that this model does not have.
        """
        if self.is_native:
            if match := _EXPERT.match(name):
                return self._stacked_expert(name, match)
            if routed := self._native_router(name):
                return routed
        if match := _SWIGLU.match(name):
            return self._swiglu(match["prefix"], match["part"])
        if self.has_fused_qkv and (match := _QKV.match(name)):
            return [self._fused_qkv(match["prefix"], match["part"])]
        return [self._whole(name)]

    def _whole(self, name: str) -> Piece:
        return self._piece(self._stored(name), self._shape(name), is_linear=_is_linear(name))

    def _piece(
        self, key: str, shape: Shape, *, rows: range | None = None, is_linear: bool = True
    ) -> Piece:
        """A piece of a tensor whose shape is `shape` in the PyTorch orientation."""
        transpose = self.is_transposed and is_linear
        return Piece(
            key=key, shape=shape[::-1] if transpose else shape, rows=rows, transpose=transpose
        )

    def _shape(self, name: str) -> Shape:
        if name not in self.shapes:
            raise NotFound(f"the model has no tensor {name}", reason="TENSOR_NOT_FOUND")
        return self.shapes[name]

    def _stored(self, name: str) -> str:
        """The stored key of a tensor that no layout fuses."""
        if name.startswith(_VISION):
            return self.vision_prefix + name.removeprefix(_VISION)
        if name.startswith(_RESAMPLER):
            rest = name.removeprefix(_RESAMPLER)
            if self.is_native:
                for index, part in (("0", "fc1"), ("2", "fc2"), ("3", "ln")):
                    rest = rest.replace(f"_linear.{index}.", f"_linear.{part}.")
            return self.resampler_prefix + rest
        if name.startswith(_TEXT):
            return self.text_prefix + name.removeprefix(_TEXT)
        return name

    def _swiglu(self, prefix: str, part: str) -> list[Piece]:
        gate, up = f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"
        width, hidden = self._shape(gate)
        if self.has_fused_swiglu:
            key = self._stored(f"{prefix}up_gate_proj.weight")
            # Gate stands first, whatever the key says.
            rows = _gate_up_rows(part, width)
            return [self._piece(key, (2 * width, hidden), rows=rows)]
        names = {"gate": (gate,), "up": (up,), "gate_up": (gate, up)}[part]
        return [self._whole(name) for name in names]

    def _fused_qkv(self, prefix: str, part: str) -> Piece:
        q, k, v = (self._shape(f"{prefix}{p}_proj.weight") for p in "qkv")
        start = {"q": 0, "k": q[0], "v": q[0] + k[0]}[part]
        size = {"q": q, "k": k, "v": v}[part][0]
        return self._piece(
            self._stored(f"{prefix}qkv_proj.weight"),
            (q[0] + k[0] + v[0], q[1]),
            rows=range(start, start + size),
        )

    def _stacked_expert(self, name: str, match: re.Match[str]) -> list[Piece]:
        num_experts, hidden = self.text.num_experts, self.text.hidden_size
        self._shape(name.replace("gate_up_proj", "gate_proj"))  # refuses what the model lacks
        bank, expert = divmod(int(match["expert"]), num_experts)
        modality = (Modality.TEXT, Modality.VISION)[bank]
        width = self.text.expert_intermediate(modality)
        prefix = f"{self._stored(match['prefix'])}{modality}_moe.experts."
        if match["part"] == "down":
            shape = (num_experts, hidden, width)
            return [Piece(key=f"{prefix}down_proj", shape=shape, expert=expert)]
        rows = _gate_up_rows(match["part"], width)
        shape = (num_experts, 2 * width, hidden)
        return [Piece(key=f"{prefix}gate_up_proj", shape=shape, expert=expert, rows=rows)]

    def _native_router(self, name: str) -> list[Piece]:
        """The router's pieces in transformers' layout; empty for any other tensor."""
        stem, _, part = self._stored(name).rpartition(".mlp.")
        text, vision = (f"{stem}.mlp.{m}_moe.gate." for m in Modality)
        num_experts, hidden = self.text.num_experts, self.text.hidden_size
        if part in ("gate.weight", "gate.weight_1"):
            key = f"{text if part == 'gate.weight' else vision}weight"
            return [Piece(key=key, shape=(num_experts, hidden), transpose=True)]
        if part == "moe_statics.e_score_correction_bias":
            return [Piece(key=gate + part, shape=(1, num_experts)) for gate in (text, vision)]
        return []


def detect(
    config: ModelConfig, names: Collection[str], shape_of: Callable[[str], Shape | None]
) -> Naming:
    """Tells the layout from the stored names and, where they leave it open, from one shape.

    `shape_of(key)` gives a stored tensor's shape, None where its file is not at hand. Raises
    InvalidArgument when the names fit no layout or the probed shape fits no orientation.
    """
    text_prefix = _first_prefix(names, ("model.language_model.", "ernie.", "model."), "layers.0.")
    if text_prefix is None:
        raise InvalidArgument(config.name, "its tensor names are of no known checkpoint layout")
    vision_prefixes = ("vision_model.", "model.vision_model.", "model.vision_tower.")
    resampler_prefixes = ("model.resampler_model.", "ernie.resampler_model.", "resampler_model.")
    naming = Naming(
        text=config.text,
        shapes=tensor_shapes(config),
        text_prefix=text_prefix,
        vision_prefix=_first_prefix(names, vision_prefixes) or vision_prefixes[0],
        resampler_prefix=_first_prefix(names, resampler_prefixes) or resampler_prefixes[0],
        is_native=text_prefix == "model.language_model.",
        has_fused_qkv=any(name.endswith(".qkv_proj.weight") for name in names),
        has_fused_swiglu=any(name.endswith(".up_gate_proj.weight") for name in names),
        is_transposed=False,
    )
    if naming.is_native:
        return naming
    return replace(naming, is_transposed=_is_transposed(naming, names, shape_of))


def _is_transposed(
    naming: Naming, names: Collection[str], shape_of: Callable[[str], Shape | None]
) -> bool:
    """Decided by the first Linear at hand that is not square."""
    for name in filter(_is_linear, naming.shapes):
        piece = naming.pieces(name)[0]
        rows, columns = piece.shape
        if rows == columns or piece.key not in names:
            continue
        found = shape_of(piece.key)
        if found in (piece.shape, piece.shape[::-1]):
            return found != piece.shape
        if found is not None:
            raise InvalidArgument(
                piece.key, f"has the shape {list(found)}; config.json asks for {list(piece.shape)}"
            )
    return naming.text_prefix == "ernie."


def _is_linear(name: str) -> bool:
    return _LINEAR.search(name) is not None


def _gate_up_rows(part: str, width: int) -> range | None:
    return {"gate": range(width), "up": range(width, 2 * width)}.get(part)


def _first_prefix(names: Collection[str], prefixes: tuple[str, ...], then: str = "") -> str | None:
    stored = (p for p in prefixes if any(name.startswith(p + then) for name in names))
    return next(stored, None)
