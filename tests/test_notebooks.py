"""What is stored in the notebooks: no errors, no warnings or progress bars, no paths of the machine they ran on, not too heavy."""
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(s.startswith((".", "_")) for s in p.relative_to(ROOT).parts))


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: str(p.relative_to(ROOT/"nbs")))
def test_stored_outputs_are_for_readers(path):
    outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"], "an error is stored"
    assert not [o for o in outputs if o.get("name") == "stderr"], "warnings or progress bars are stored"
    texts = ["".join(o.get("text", [])) + "".join("".join(v) for k, v in o.get("data", {}).items() if k.startswith("text/")) for o in outputs]
    told = [m[0] for t in texts for m in re.finditer(r"/(?:home|root|work|Users)/[\w./-]+|site-packages", t)]
    assert not told, f"outputs tell of the machine: {told[:3]}"
    assert path.stat().st_size < 500_000, "smaller or fewer pictures"
