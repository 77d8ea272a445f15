"""The car client, which at its end waits for late echoes even on a machine that stands still for a while."""

from __future__ import annotations

import sys

from services.car_client import __main__ as car

if __name__ == "__main__":
    car.GRACE = 20.0
    sys.exit(car.main())
