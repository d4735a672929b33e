"""What learner and teacher need: equation checks, graded exercises, widgets, and the builder of the notebooks."""

from klq_edu.course.checks import Checks, start
from klq_edu.course.display import Widget, explore, show, source

__all__ = ["Checks", "Widget", "explore", "show", "source", "start"]
