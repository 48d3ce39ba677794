"""Look for evidence against a site that was found."""
