"""Rotary bases of NTK scaling, and CRD NTK, which draws positions and bases for training."""

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from chunkattn._checks import check_int, check_integer_tensor, check_positive
from chunkattn.rotary.tables import rope_rows

# CRD NTK draws the offset of the positions below this.
_OFFSETS = 1 << 22


def ntk_base(base: float, rotary_dim: int, scale: float) -> float:
    """The NTK-aware base: the lowest frequency is divided by scale, the highest stays 1.

    ``base * scale ** (rotary_dim / (rotary_dim - 2))``, the "NTK-aware" interpolation of YaRN (arXiv 2309.00071,
    section 3) and the b' of CRD NTK (arXiv 2410.04211), whose lambda is scale.

    Args:
        base: rope theta of the trained model.
        rotary_dim: rotated dimensions of a head, even and at least 4.
        scale: how many times the trained length is covered; 1 leaves the base as it is.

    Raises:
        TypeError, ValueError: an argument is not what is listed above, or base or scale is not positive and finite.
    """
    check_positive("base", base)
    _check_ntk_dim(rotary_dim)
    check_positive("scale", scale)
    return base * scale ** (rotary_dim / (rotary_dim - 2))


def dynamic_ntk_base(base: float, rotary_dim: int, length: int, original_length: int, factor: float = 1.0) -> float:
    """The base of dynamic NTK: :func:`ntk_base` by ``factor * length / original_length - (factor - 1)``.

    Up to the trained length the scale is 1 and the base stays as it is. This is the rope type "dynamic" of Hugging
    Face transformers, the "Dynamic NTK" of YaRN (arXiv 2309.00071).

    Args:
        base: rope theta of the trained model.
        rotary_dim: rotated dimensions of a head, even and at least 4.
        length: tokens to cover, at least 1.
        original_length: tokens the model was trained on, at least 1.
        factor: S of CRD NTK (arXiv 2410.04211), the slope of the scale in ``length / original_length``.

    Raises:
        TypeError, ValueError: an argument is not what is listed above, or base or factor is not positive and finite.
    """
    check_int("length", length, 1)
    check_int("original_length", original_length, 1)
    check_positive("factor", factor)
    excess = max(0, length - original_length)
    return ntk_base(base, rotary_dim, 1 + factor * excess / original_length)


@dataclass(frozen=True)
class CyclicRotary:
    """The rotary positions of one training step, as :meth:`CRDNTK.draw` gives them. Queries and keys share them.

    Attributes:
        rotary_dim: rotated dimensions of a head.
        base: rope theta b' of this step.
        offset: p0, added to every position, in tokens.
        cycle: M, the positions there are, in tokens; it exceeds the sequence's length.
    """

    rotary_dim: int
    base: float
    offset: int
    cycle: int

    def positions(self, positions: Tensor) -> Tensor:
        """``(p + offset) % cycle`` for each true position p.

        Args:
            positions: [...] of any shape, in tokens, of an integer dtype.

        Returns:
            int64 [...], from 0 to cycle - 1, on the device of positions.

        Raises:
            TypeError: positions is not a tensor of integers.
        """
        check_integer_tensor("positions", positions)
        return (positions.to(torch.int64) + self.offset) % self.cycle

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cosines and sines of true positions: :func:`rope_rows` of :meth:`positions`.

        Args:
            positions: [...] of any shape, in tokens, of an integer dtype.

        Returns:
            cos, sin: float32 [..., rotary_dim / 2], on the device of positions.

        Raises:
            TypeError: positions is not a tensor of integers.
        """
        return rope_rows(self.positions(positions), self.rotary_dim, self.base)


@dataclass(frozen=True)
class CRDNTK:
    """Cyclic, randomly truncated, dynamically growing NTK positions (arXiv 2410.04211, "CRD NTK") for fine-tuning.

    Each training step shows the model its sequence at another stretch of a circle of positions of another
    circumference, so that it meets positions and bases far beyond the length it is trained on:

    - cyclic: position p becomes ``(p + offset) % cycle``, the offset uniform in [0, 2**22);
    - randomly truncated: ``cycle = base_period + length + u``, u uniform in [0, period / 2);
    - dynamically growing: the period doubles every grow_every steps from period_start up to period_max, and the factor
      from factor up to factor_max;
    - NTK: the base is :func:`dynamic_ntk_base` of the cycle.

    For inference use the true positions and one base: ``rope_table(length, rotary_dim, ntk_base(base, rotary_dim,
    scale))``. Nothing here has state: :meth:`draw` depends on its arguments and these settings alone.

    Attributes:
        base: rope theta b of the trained model.
        rotary_dim: rotated dimensions d of a head, even and at least 4.
        original_length: L0, the tokens the model was trained on.
        base_period: M0, in tokens, at least 0.
        period_start: P of the first steps, in tokens, at least 2.
        period_max: the largest P, in tokens, at least period_start.
        grow_every: training steps between two doublings, at least 1.
        factor: S of the first steps, positive.
        factor_max: the largest S, at least factor. None: S does not grow.

    Raises:
        TypeError, ValueError: a setting is not what is listed above.
    """

    base: float
    rotary_dim: int
    original_length: int
    _: KW_ONLY
    base_period: int = 1 << 15
    period_start: int = 1 << 15
    period_max: int = 1 << 20
    grow_every: int = 2000
    factor: float = 1.0
    factor_max: float | None = None

    def __post_init__(self) -> None:
        check_positive("base", self.base)
        _check_ntk_dim(self.rotary_dim)
        check_int("original_length", self.original_length, 1)
        check_int("base_period", self.base_period, 0)
        check_int("period_start", self.period_start, 2)
        check_int("period_max", self.period_max, self.period_start)
        check_int("grow_every", self.grow_every, 1)
        check_positive("factor", self.factor)
        if self.factor_max is not None:
            check_positive("factor_max", self.factor_max)
            if self.factor_max < self.factor:
                raise ValueError(f"factor_max must be at least factor, {self.factor}, got {self.factor_max}")

    def period_at(self, step: int) -> int:
        """P at a training step, counted from 0: ``min(period_start * 2 ** (step // grow_every), period_max)``."""
        return self._grown(self.period_start, self.period_max, step)

    def factor_at(self, step: int) -> float:
        """S at a training step, counted from 0: ``min(factor * 2 ** (step // grow_every), factor_max)``."""
        return self._grown(self.factor, self.factor if self.factor_max is None else self.factor_max, step)

    def draw(self, step: int, length: int, generator: torch.Generator) -> CyclicRotary:
        """The positions of a training step.

        The generator is read, not advanced: equal step, length and generator state give the same draw, whatever was
        drawn before, so that a resumed run and every rank with an equally seeded generator draw alike.

        Args:
            step: training steps done before this one, at least 0.
            length: keys of the sequence, in tokens, at least 1.
            generator: the randomness, on any device; on a GPU reading it waits for the device.

        Raises:
            TypeError, ValueError: an argument is not what is listed above.
        """
        period, factor = self.period_at(step), self.factor_at(step)
        check_int("length", length, 1)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        # The step goes into the seed, because the generator is the same at every step.
        seed = (_uniform(1 << 62, generator.clone_state()) + step) % (1 << 62)
        randomness = torch.Generator("cpu").manual_seed(seed)
        offset = _uniform(_OFFSETS, randomness)
        cycle = self.base_period + length + _uniform(period // 2, randomness)
        base = dynamic_ntk_base(self.base, self.rotary_dim, cycle, self.original_length, factor)
        return CyclicRotary(self.rotary_dim, base, offset, cycle)

    def _grown(self, start: float, largest: float, step: int) -> float:
        check_int("step", step, 0)
        # Beyond the logarithm further doublings change nothing, and a late step would make an enormous number.
        doublings = min(step // self.grow_every, math.ceil(math.log2(largest / start)))
        return min(start * 2**doublings, largest)


def _uniform(count: int, generator: torch.Generator) -> int:
    """A random integer in [0, count)."""
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def _check_ntk_dim(rotary_dim: int) -> None:
    check_int("rotary_dim", rotary_dim, 4)
    if rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even and at least 4, got {rotary_dim}")
