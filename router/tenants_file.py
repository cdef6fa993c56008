"""The file of tenants: YAML or JSON, tenant to the SHA-256 digests of its bearer tokens."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from quire.serving import StartupError

if TYPE_CHECKING:
    from collections.abc import Hashable
    from pathlib import Path

MAX_TENANT_CHARS = 128
TENANT_NAME = f"1 to {MAX_TENANT_CHARS} printable ASCII characters and no space at either end"
_DIGEST_CHARS = 64


def is_tenant_name(name: str) -> bool:
    """Whether call metadata can carry it as it is: the memory service is asked about a tenant by that."""
    if name == "*":  # the memory service counts published prefixes under it
        return False
    is_text = name.isascii() and name.isprintable() and name == name.strip()
    return is_text and 1 <= len(name) <= MAX_TENANT_CHARS


def _tenant(name: str) -> str:
    if not is_tenant_name(name):
        raise ValueError(f"a tenant's name has {TENANT_NAME}")
    return name


def _digest(text: str) -> str:
    if len(text) != _DIGEST_CHARS or not set(text) <= set(string.hexdigits):
        # What stands there instead may be a token: it is not repeated.
        message = f"not a SHA-256 digest, which has {_DIGEST_CHARS} hexadecimal digits"
        raise ValueError(message)
    return text


_Digests = Annotated[list[Annotated[str, AfterValidator(_digest)]], Field(min_length=1)]
_TENANTS = TypeAdapter(
    Annotated[dict[Annotated[str, AfterValidator(_tenant)], _Digests], Field(min_length=1)]
)


class _TextLoader(yaml.BaseLoader):
    """Every scalar is text, so that a tenant may be called `on` or 7; a name that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 -- as the library has it
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} stands there twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


def read_tenants(path: Path) -> list[tuple[bytes, str]]:
    """Digest of each token with its tenant; raises StartupError, in one line, when the file is malformed."""
    try:
        tenants = _TENANTS.validate_python(_load(path))
    except ValidationError as error:
        found = error.errors()[0]
        where = "".join(f" {part}" for part in found["loc"] if part != "[key]")
        raise StartupError(f"the tenants file {path}:{where}: {found['msg']}") from None
    owners: dict[bytes, str] = {}
    for tenant, digests in tenants.items():
        for digest in map(bytes.fromhex, digests):
            other = owners.setdefault(digest, tenant)
            if other != tenant:
                message = f"{other!r} and {tenant!r} have the same token"
                raise StartupError(f"the tenants file {path}: {message}")
    return list(owners.items())


def _load(path: Path) -> object:
    try:
        return yaml.load(path.read_bytes(), _TextLoader)  # noqa: S506 -- it makes nothing but text, lists and mappings
    except OSError as error:
        raise StartupError(f"the tenants file {path} cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise StartupError(f"the tenants file {path}: {error.problem}{line}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise StartupError(f"the tenants file {path} is not text: {message}") from None
