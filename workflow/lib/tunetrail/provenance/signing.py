"""Signatures: a DSSE envelope around the record, ed25519, offline.

Signatures are optional: unsigned artifacts are legal and always shown as UNSIGNED. A policy file says whose keys count
and what must be signed. https://github.com/secure-systems-lab/dsse
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from tunetrail.config.fields import Block
from tunetrail.errors import ConfigError, DataError
from tunetrail.files import parse_json, read_regular, replace_file
from tunetrail.provenance.manifest import PROVENANCE, SIGNATURE, canonical
from tunetrail.provenance.record import Record

PAYLOAD_TYPE = "application/vnd.in-toto+json"


class TrustPolicy(Block):
    """What `audit verify --policy FILE` requires in addition to integrity."""

    keys: dict[str, Path] = Field(default={}, description="name of a signer -> PEM file of their ed25519 public key")
    require_signature: bool = Field(default=False, description="every record must be signed by one of `keys`")
    allow_dirty: bool | None = Field(
        default=None, description="false: made from a dirty tree is an error; true: it is not even a warning"
    )
    require_sealed: bool = Field(default=False, description="that an artifact is in no ledger is an error")


def read_policy(path: Path) -> TrustPolicy:
    """Reads a policy file. Raises ConfigError with one line per mistake."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        policy = TrustPolicy.model_validate(content or {})
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {str(e).splitlines()[0]}") from None
    except ValidationError as e:
        lines = [f"{path}: {'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors()]
        raise ConfigError("\n".join(lines)) from None
    return policy.model_copy(update={"keys": {name: path.parent / key for name, key in policy.keys.items()}})


def _public_key(path: Path) -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path}: no public key in PEM form") from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: not an ed25519 key; make one with: openssl genpkey -algorithm ed25519")
    return SSlibKey.from_crypto(key)


def sign(folder: Path, private_key: Path) -> None:
    """Writes the envelope of a folder's record next to it, through no link. Raises ConfigError for a bad key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    try:
        key = load_pem_private_key(private_key.read_bytes(), password=None)
    except OSError as e:
        raise ConfigError(f"{private_key}: {e.strerror}") from None
    except (ValueError, TypeError):
        raise ConfigError(f"{private_key}: no unencrypted private key in PEM form") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{private_key}: not an ed25519 key; make one with: openssl genpkey -algorithm ed25519")
    envelope = Envelope(read_regular(folder / PROVENANCE), PAYLOAD_TYPE, {})
    envelope.sign(CryptoSigner(key))
    replace_file(folder / SIGNATURE, canonical(envelope.to_dict()))


def signers(folder: Path, record: Record | None, policy: TrustPolicy) -> list[str]:
    """Names of the policy's keys that signed this very record; none where there is no signature.

    Raises DataError if the envelope is broken, contains another record, or has a wrong signature.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError

    try:
        content = read_regular(folder / SIGNATURE)
        envelope = Envelope.from_dict(parse_json(content))
        whole = canonical(envelope.to_dict()) == content
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, AttributeError, OSError):
        whole = False
    if not whole:
        raise DataError("the envelope is not what was written")
    if record is None:
        raise DataError("there is no record it could be of")
    if envelope.payload_type != PAYLOAD_TYPE or envelope.payload != record.content:
        raise DataError("the envelope holds another record")
    names = []
    for name, key_file in policy.keys.items():
        key = _public_key(key_file)
        if key.keyid not in envelope.signatures:
            continue
        try:
            envelope.verify([key], 1)
        except (VerificationError, ValueError):  # one that is no signature at all
            raise DataError(f"the signature in the name of {name} is false") from None
        names.append(name)
    return names
