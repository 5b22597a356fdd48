"""Update gain and token influence: what a batch's distillation gradient gains, measured from rollouts alone."""
