"""FP32 products of a script, held at what its policy says, whatever the script says itself.

``torch.set_float32_matmul_precision("high")`` stands at the top of many scripts. Under the policy ``fp32`` it would
make the run a TF32 run by the name of an FP32 one, and a comparison's baseline with it. So the switches are set before
the script starts, and set again, with a notice, wherever the script passes through PyTorch's entry points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from halfstep.autocast import float32_of
from halfstep.autocast.float32 import Float32, hold, is_held
from halfstep.launch.own import caller

if TYPE_CHECKING:
    from halfstep.launch.session import Session


class HeldFloat32:
    """The switches under ``session``; who opens it puts them back (`halfstep.autocast.Float32Switches`)."""

    def __init__(self, session: Session) -> None:
        #: Whatever the policy: FP32 products are FP32. For those who compute FP32 shadows of 16-bit operations.
        self.exact_beside_16_bit = False
        self._session = session
        self._held: Float32 | None = None

    def hold(self, where: str | None = None) -> None:
        """Set the switches, if they are not as the policy wants them.

        Args:
            where: the script's line that set them otherwise, where it is known.
        """
        policy = self._session.policy
        wanted = float32_of(policy)
        if wanted is None and self.exact_beside_16_bit:
            wanted = "ieee"
        if wanted is not None and not is_held(wanted):
            if self._held == wanted:
                self._notice(wanted, where)
            hold(wanted)
        self._held = wanted

    def setting(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``torch.set_float32_matmul_precision``: what it changed is changed back at once, and the line is named."""
        result = original(*args, **kwargs)
        self.hold(caller())
        return result

    def _notice(self, wanted: Float32, where: str | None) -> None:
        policy = self._session.policy
        advice = "; the policy tf32 is the one that allows TF32" if wanted == "ieee" and not policy.lowers else ""
        self._session.notice(
            "own-tf32",
            "the script says itself what FP32 products are computed in (TF32, or BF16 on a CPU): set back, because "
            f"under {policy} they are computed in {'FP32' if wanted == 'ieee' else 'TF32'}{advice}",
            where,
        )
