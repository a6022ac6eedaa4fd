"""Write the JSON schemas of the files that users write, for editors: `python tools/write_schemas.py`.

The pipeline itself holds the files against the models; a test compares these schemas with them.
"""

import json
from pathlib import Path

from harness.analysis.claims import Claims
from harness.experiments.configuration import Configuration
from harness.experiments.experiment import Experiment
from harness.experiments.files import json_schema

FOLDER = Path(__file__).resolve().parents[1] / "workflows" / "schemas"
MODELS = {"experiment": Experiment, "claims": Claims, "config": Configuration}


def schema_text(name: str) -> str:
    """The content of FOLDER/NAME.schema.json."""
    return json.dumps(json_schema(MODELS[name]), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        path = FOLDER / f"{name}.schema.json"
        path.write_text(schema_text(name), encoding="utf-8")
        print(f"wrote {path}")
