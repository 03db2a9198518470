"""Whether a vLLM that was patched in place behaves as patched: its probes, in its own environment.

Its files are the locked ones to the byte by then. So what fails is that something else is run: the
files of another vLLM, or files that were changed besides.
"""

from __future__ import annotations

from overlay.answers import advice
from overlay.answers.probe import Python
from overlay.base.errors import Exit, OverlayError
from overlay.inplace import inplace
from overlay.inplace.inplace import InPlaceResult
from overlay.patches.workspace import Workspace
from overlay.probes.probing import Probing, in_environment
from overlay.wheels.identity import identify

#: Topics that an error names.
_TOLD = 3


def require(workspace: Workspace, python: Python, done: InPlaceResult) -> Probing:
    """What the probes say of the vLLM that is patched now. One of which nothing can be told passes.

    Raises:
        OverlayError: it does not behave as patched. If it was patched just now, it is reverted.
    """
    identity = identify(done.after, workspace.versions)
    release = identity.release
    assert release is not None
    topics = [path.topic for path in workspace.series(release)]
    found = in_environment(python.executable, done.site, topics)
    if not found.failed:
        return found
    told = "; ".join(f"{one.topic}: {one.why}" for one in found.failed[:_TOLD])
    if len(found.failed) > _TOLD:
        told += f"; and {len(found.failed) - _TOLD} more"
    why = f"{found}. {told}"
    if done.action != "patched":
        raise OverlayError(
            f"vLLM {done.after} in {done.site} does not behave as patched", why,
            f"Install it anew: {advice.anew(python, release, identity.label)}", Exit.INTEGRITY,
        )  # fmt: skip
    inplace.revert(workspace, python)
    raise OverlayError(
        f"vLLM {done.before} in {done.site} does not behave as patched, and is reverted", why,
        "Report it, with the output of --json; --no-probe leaves it patched all the same",
        Exit.INTEGRITY,
    )  # fmt: skip
