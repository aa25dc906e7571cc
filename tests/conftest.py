import json
from dataclasses import dataclass
from pathlib import Path

import pytest

ASSETS = Path(__file__).parent / "assets"


@dataclass
class Photographs:
    """18 photographs of fruits and nuts with polygons, in COCO format."""

    json_file: Path = ASSETS / "fruits_nuts" / "trainval.json"
    images: Path = ASSETS / "fruits_nuts" / "images"

    def coco(self):
        return json.loads(self.json_file.read_text())


@pytest.fixture
def photographs():
    return Photographs()
