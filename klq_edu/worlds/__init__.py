"""What there is to train on."""
