"""How much the quantization of each tensor costs: metrics behind one call, one table as the result.

table.py     Sensitivity: predicted loss increase per site, head and width; JSON
measure.py   measure_sensitivity: the call                agreement.py   how well one table predicts another
metric.py    what a metric is, and the registry of them   probe.py       what is quantized in a model, and compared
fisher.py    diagonal Fisher (one backward per image)     kl.py          one site at a time (ZeroQ)
hessian.py   Hutchinson trace (HAWQ-V2)                   learned.py     learned scales as indicators (LIMPQ)
features.py  how near features are to others              distance.py    how far answers are from others
feature_error.py, cosine.py   what `fisher` and `kl` are, for models that answer with features
"""

from qvit.measure.agreement import agreement_of
from qvit.measure.measure import MINIMUM_IMAGES, default_metric, measure_sensitivity
from qvit.measure.metric import METRICS
from qvit.measure.table import Sensitivity, site_type

__all__ = [
    "METRICS",
    "MINIMUM_IMAGES",
    "Sensitivity",
    "agreement_of",
    "default_metric",
    "measure_sensitivity",
    "site_type",
]
