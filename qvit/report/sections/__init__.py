"""The sections of the page about runs, a file each; `qvit.report.sections.base` says what one is."""
