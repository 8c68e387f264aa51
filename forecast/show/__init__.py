"""What a forecast looks like: tables on the screen, plan.json, plan.html."""
