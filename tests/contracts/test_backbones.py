"""Every backbone that comes with erasekit keeps the contract that `check_backbone` tells authors of others about."""

import pytest

from erasekit.testing import check_backbone, tiny_folder

FAMILIES = {"sd14": "tiny", "sd15": "tiny", "sdxl": "tiny-xl", "flux": "tiny-flux", "flux-schnell": "tiny-flux"}
FAMILIES |= dict.fromkeys(("sd35-medium", "sd35-large"), "tiny-sd3")
FAMILIES |= {
    f"flux2-klein-{kind}": f"tiny-flux2{'-base' if 'base' in kind else ''}" for kind in ("4b", "base-4b", "9b", "base-9b")
}


@pytest.mark.parametrize("backbone", ["tiny", "tiny-flux", "tiny-xl", "tiny-sd3", "tiny-flux2-base", "sd15-mini", "flux-mini"])
def test_a_backbone_keeps_its_contract(backbone):
    check_backbone(backbone, size=16 if backbone.startswith("tiny") else None)


@pytest.mark.parametrize("backbone", FAMILIES)
def test_a_model_of_the_hub_keeps_it_with_tiny_weights(backbone):
    check_backbone(backbone, settings={"path": str(tiny_folder(FAMILIES[backbone]))}, size=16)
