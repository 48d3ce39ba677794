"""Find the module at which a candidate's error begins."""
