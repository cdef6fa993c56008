"""Render the chart's profiles into `k8s/rendered` with the real Helm engine, or check that they are fresh (`--check`)."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from helm_python import Chart

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "k8s" / "chart"
OUT = ROOT / "k8s" / "rendered"
PROFILES = ("cpu", "dra", "single-container")
RELEASE = "quire"
MANIFEST = "quire.yaml"

_HEADER = "# Profile {profile}, rendered from k8s/chart by `make chart`; do not edit.\n"
_KUSTOMIZATION = """# kubectl apply -k k8s/rendered/{profile}
# Namespace and images are changed by a kustomization of your own that lists this folder. Names are not: command lines
# and selectors hold them, so a second copy needs a namespace of its own.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [{manifest}]
"""
# They would say that Helm owns the objects.
_HELM_LABELS = re.compile(r"^ *(app\.kubernetes\.io/managed-by|helm\.sh/chart): .*\n", re.MULTILINE)
_HOOK = "helm.sh/hook:"


def main() -> int:
    """0 when all is well; 1 when a rendering is stale."""
    if "--check" not in sys.argv[1:]:
        write(OUT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        stale = _differing(Path(folder))
    if stale:
        print(f"stale manifests, run `make chart`: {', '.join(stale)}", file=sys.stderr)
        return 1
    return 0


def write(out: Path) -> None:
    """Write what each profile renders to, and its kustomization, below `out`."""
    for profile in PROFILES:
        folder = out / profile
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(rendered(profile), encoding="utf-8")
        kustomization = _KUSTOMIZATION.format(profile=profile, manifest=MANIFEST)
        (folder / "kustomization.yaml").write_text(kustomization, encoding="utf-8")
        # kustomize reads nothing outside its folder, so the file lies there and the short name is a link.
        link = out / f"{profile}.yaml"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(profile) / MANIFEST)


def rendered(profile: str) -> str:
    """All objects of a profile with default values; without Helm's own labels and its test."""
    with Chart.load(CHART) as chart:
        templates = chart.render({"profile": profile}, name=RELEASE, namespace="default")
    documents = [
        found.strip()
        for path, text in sorted(templates.items())
        if path.endswith(".yaml")
        for found in re.split(r"^---\n", _HELM_LABELS.sub("", text), flags=re.MULTILINE)
        if found.strip() and _HOOK not in found
    ]
    return _HEADER.format(profile=profile) + "---\n" + "\n---\n".join(documents) + "\n"


def _differing(fresh: Path) -> list[str]:
    """Names of files that differ from the committed ones, or that only one side has."""
    names = {_name(found, fresh) for found in fresh.rglob("*.yaml")}
    names |= {_name(found, OUT) for found in OUT.rglob("*.yaml")}
    return sorted(name for name in names if _bytes(fresh / name) != _bytes(OUT / name))


def _name(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder))


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
