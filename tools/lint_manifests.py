"""Lint the rendered manifests and the Dockerfile for security with checkov.

    python tools/lint_manifests.py [FILE ...]

checkov pins libraries that ours do not agree with, so it lives in an environment of its own below .cache, made at the
first call. A finding that is not listed here fails, and so does a listed one that is found no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VERSION = "3.3.30"
ENVIRONMENT = ROOT / ".cache" / f"checkov-{VERSION}"
FILES = (*sorted(ROOT.glob("k8s/rendered/*/quire.yaml")), ROOT / "Dockerfile")
ACCEPTED = {
    "CKV_K8S_11": "no CPU limit: being throttled within a step costs more than a neighbour; threads are bounded by flag",
    "CKV_K8S_15": "IfNotPresent: the tag is a version and never moves; a digest can be set",
    "CKV_K8S_21": "the namespace is chosen when the manifests are applied",
    "CKV_K8S_43": "no digest: it belongs to an image that each user builds; image.digests takes it",
}


def main() -> int:
    """0 when nothing but what is accepted was found."""
    files = [Path(name).resolve() for name in sys.argv[1:]] or list(FILES)
    found = findings(files)
    new = [line for check, line in found if check not in ACCEPTED]
    if not sys.argv[1:]:
        gone = ACCEPTED.keys() - {check for check, _ in found}
        new += [f"{check} is accepted here and found no more" for check in sorted(gone)]
    for line in new:
        print(line, file=sys.stderr)
    return 1 if new else 0


def findings(files: list[Path]) -> list[tuple[str, str]]:
    """Check and description of everything that checkov has to say against `files`."""
    options = ["--skip-download", "--quiet", "--compact", "--output", "json"]
    names = [word for path in files for word in ("--file", str(path))]
    command = [str(_program()), *options, "--framework", "kubernetes", "dockerfile", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        reports = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        message = f"checkov did not report: {done.stdout}{done.stderr}"
        raise RuntimeError(message) from error
    return _failed(reports if isinstance(reports, list) else [reports])


def _failed(reports: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """One framework a report; each must have looked at something."""
    failed = []
    for report in reports:
        assert report["summary"]["passed"] > 0, report
        assert report["summary"]["parsing_errors"] == 0, report
        for check in report["results"]["failed_checks"]:
            where = f"{check['file_path']}:{check['file_line_range'][0]} {check['resource']}"
            failed.append(
                (check["check_id"], f"{check['check_id']} {where}: {check['check_name']}")
            )
    return failed


def _program() -> Path:
    program = ENVIRONMENT / "bin" / "checkov"
    if not program.is_file():
        print(f"installing checkov {VERSION} into {ENVIRONMENT.relative_to(ROOT)} (a minute)")
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", f"checkov=={VERSION}"]
        subprocess.run(pip, check=True)
    return program


if __name__ == "__main__":
    sys.exit(main())
