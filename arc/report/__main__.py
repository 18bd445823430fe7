"""`python -m arc.report RUN`: writes RUN/report.html anew."""

import sys

from arc.report.page import main

sys.exit(main())
