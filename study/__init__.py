"""A transfer study: its plan, its runs, its results, its report."""
