"""Compare metrics, allocations and repair at equal cost: `compare`, its result, and its page."""

from vlprune.compare.page import write_page as write_page
from vlprune.compare.results import Comparison as Comparison
from vlprune.compare.results import Difference as Difference
from vlprune.compare.results import Point as Point
from vlprune.compare.results import write_csv as write_csv
from vlprune.compare.run import compare as compare
