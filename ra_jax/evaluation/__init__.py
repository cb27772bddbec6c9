"""How good a removal is: metrics of images against a ground truth, or against themselves."""
