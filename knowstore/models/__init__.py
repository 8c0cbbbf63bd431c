"""Model references, devices and precisions: what to load, from where, on what."""

from knowstore.models.conversion import Progress
from knowstore.models.device import choose_device, choose_dtype
from knowstore.models.fingerprints import directory_fingerprint
from knowstore.models.pull import pull, pull_defaults
from knowstore.models.references import (
    DEFAULT,
    NO_READER,
    ROLES,
    ResolvedModel,
    Role,
    UnresolvedModel,
    lasting_reference,
    listing,
    locate,
    resolve,
)

__all__ = [
    "DEFAULT",
    "NO_READER",
    "ROLES",
    "Progress",
    "ResolvedModel",
    "Role",
    "UnresolvedModel",
    "choose_device",
    "choose_dtype",
    "directory_fingerprint",
    "lasting_reference",
    "listing",
    "locate",
    "pull",
    "pull_defaults",
    "resolve",
]
