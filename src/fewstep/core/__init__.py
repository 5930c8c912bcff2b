"""Tasks, the inner loop, the meta-gradient, and the recipes made of them."""
