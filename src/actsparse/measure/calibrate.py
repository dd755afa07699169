"""What ``actsparse.calibrate`` is: calibration whose budgets are measured by :mod:`actsparse.measure.evaluate`."""

from __future__ import annotations

import functools
from typing import Any

from actsparse.calibration import collect
from actsparse.measure import evaluate


@functools.wraps(collect.calibrate)
def calibrate(*args: Any, **options: Any) -> Any:
    return collect.calibrate(*args, **{"scorer": evaluate.scorer, **options})
