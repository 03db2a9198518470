"""The bill of materials of a patched wheel (PEP 770, CycloneDX): what was changed, from what.

It is a function of VERSIONS.toml, the patches and the wheel that is patched: no time, no machine,
no path.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence

from cyclonedx.model import HashAlgorithm, HashType, XsUri, component
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import (
    Component,
    ComponentType,
    Diff,
    PatchClassification,
    Pedigree,
)
from cyclonedx.model.issue import IssueClassification, IssueType
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from overlay.patches.patch import Patch
from overlay.releases.versions import Versions
from overlay.wheels.origin import Origin

SCHEMA = SchemaVersion.V1_6
_OTHER_BUILD = "Upstream's Python files; compiled files of another build than the wheel's."
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "vllm-overlay.invalid")


def build(versions: Versions, origin: Origin, patches: Sequence[Patch]) -> bytes:
    """The SBOM of `origin` with `patches` as canonical JSON.

    Of what is not the official wheel it says so; a wheel's file is named in any case.
    """
    project, local = versions.upstream.project, origin.patched_version(versions)
    release, upstream = origin.release, _origin(project, origin)
    files = [_patch_file(patch) for patch in patches]
    subject = Component(
        name=project,
        version=local,
        type=ComponentType.LIBRARY,
        purl=PackageURL("pypi", None, project, local),
        bom_ref=f"{project}@{local}",
        pedigree=Pedigree(
            ancestors=[upstream],
            patches=[_patch(patch) for patch in patches],
            notes=f"Source tree {release.tree} (git) in place of {release.upstream_tree}.",
        ),
    )
    bom = Bom(components=files)
    bom.metadata.component = subject
    bom.metadata.timestamp = None  # type: ignore[assignment]  # when is no property of the bytes
    bom.serial_number = _serial(local, [upstream, *files])
    bom.register_dependency(subject, [*files])
    text = make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string()
    return (json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n").encode()


def _origin(project: str, origin: Origin) -> Component:
    """What was patched: the official wheel, or the same source, compiled by someone else."""
    wheel = origin.wheel
    qualifiers = {"file_name": wheel.file} if wheel else None
    return Component(
        name=project,
        version=origin.version,
        type=ComponentType.LIBRARY,
        purl=PackageURL("pypi", None, project, origin.version, qualifiers),
        bom_ref=f"upstream:{wheel.file if wheel else f'{project}@{origin.version}'}",
        description=None if origin.is_official else _OTHER_BUILD,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)] if wheel else None,
    )


def _patch_file(patch: Patch) -> Component:
    return Component(
        name=f"patches/{patch.path}",
        type=ComponentType.FILE,
        bom_ref=f"patch:{patch.path}",
        description=patch.mail.subject,
        hashes=[
            HashType(alg=HashAlgorithm.SHA_256, content=hashlib.sha256(patch.data).hexdigest())
        ],
    )


def _patch(patch: Patch) -> component.Patch:
    bug = patch.mail.trailer("Bug")
    return component.Patch(
        type=PatchClassification.UNOFFICIAL,
        diff=Diff(url=XsUri(f"patches/{patch.path}")),
        resolves=[
            IssueType(
                type=IssueClassification.DEFECT,
                id=bug,
                name=patch.mail.subject,
                references=[XsUri(bug)],
            )
        ]
        if bug
        else (),
    )


def _serial(local: str, files: Sequence[Component]) -> uuid.UUID:
    hashes = (found.content for file in files for found in file.hashes)
    return uuid.uuid5(_NAMESPACE, "\n".join((local, *hashes)))


def schema_error(data: bytes) -> str | None:
    """Why `data` is no CycloneDX document, or None if it is one."""
    from cyclonedx.validation.json import JsonStrictValidator  # slow to import

    try:
        found = JsonStrictValidator(SCHEMA).validate_str(data.decode())
    except (ValueError, UnicodeDecodeError) as error:
        return f"it is not JSON ({error})"
    return str(found) if found else None
