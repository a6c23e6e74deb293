"""Check two common names of timm, and print the problems and which of timm and torch were imported."""

import sys

from m2f.model.backbones.timm_names import name_problem

sys.stdout.write(f"{name_problem('resnet50')} {name_problem('resnet50.tv_in1k')}\n")
sys.stdout.write(f"{sorted({'timm', 'torch'} & set(sys.modules))}\n")
