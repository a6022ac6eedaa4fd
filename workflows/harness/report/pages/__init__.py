"""Pages of the documentation whose numbers come out of the pipeline's tables: a template has the words, and no number.

`Results` are the tables that the pipeline has just written; `Recorded` are those that the committed pages were made
from (docs/tables). `render` fills a template with either, so that the two can be compared.
"""

from harness.report.pages.recorded import Recorded, record
from harness.report.pages.render import compared, render, templates
from harness.report.pages.results import Results
from harness.report.pages.source import Source

__all__ = ["Recorded", "Results", "Source", "compared", "record", "render", "templates"]
