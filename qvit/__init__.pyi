"""The public API: what `import qvit` offers, each name with its home.

`qvit/__init__.py` reads this file: a name that is imported here is available as `qvit.NAME` and loaded on first use.

    plan → quantize → calibrate → [train] → freeze        (see `qvit.models.convert`)
    TrainConfig → train → load_run                        (see `qvit.runs.run`)
"""

from qvit.allocate import allocate_plan as allocate_plan
from qvit.data.open import calibration_batches as calibration_batches
from qvit.data.open import data_config_of as data_config_of
from qvit.data.open import eval_loader as eval_loader
from qvit.data.open import open_data as open_data
from qvit.deploy.engines import load as load
from qvit.deploy.export.onnx import export_onnx as export_onnx
from qvit.deploy.export.onnx import export_openvino as export_openvino
from qvit.deploy.file.artifact import Artifact as Artifact
from qvit.errors import QvitError as QvitError
from qvit.measure import measure_sensitivity as measure_sensitivity
from qvit.methods.ptq.reconstruction import ReconstructOptions as ReconstructOptions
from qvit.methods.ptq.stages import ptq as ptq
from qvit.models.calibrate import calibrate as calibrate
from qvit.models.convert import freeze as freeze
from qvit.models.convert import plan_of as plan_of
from qvit.models.convert import quantize as quantize
from qvit.models.create import create_model as create_model
from qvit.models.families import inspect_model as inspect_model
from qvit.plan.quant_plan import QuantPlan as QuantPlan
from qvit.plan.quant_plan import Rule as Rule
from qvit.runs.dry_run import dry_run as dry_run
from qvit.runs.finished import load_run as load_run
from qvit.runs.packed import pack_run as pack_run
from qvit.runs.run import resume as resume
from qvit.runs.run import train as train
from qvit.training.config import TrainConfig as TrainConfig
from qvit.training.evaluate import evaluate as evaluate
from qvit.version import __version__ as __version__
