"""The figures of the report, one file each.

Each function takes the runs per policy, or the comparison where a figure shows what was judged, and returns a
:class:`~halfstep.report.figures.chart.Chart`. A chart whose data no run has comes without a drawing and says
so.
"""

from halfstep.report.figures.chart import Chart, Key
from halfstep.report.figures.exponents import LayerNumbers, exponents
from halfstep.report.figures.heatmap import underflow
from halfstep.report.figures.losses import losses
from halfstep.report.figures.memory import memory
from halfstep.report.figures.scale import loss_scales
from halfstep.report.figures.times import step_times

__all__ = ["Chart", "Key", "LayerNumbers", "exponents", "loss_scales", "losses", "memory", "step_times", "underflow"]
