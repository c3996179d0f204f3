"""Uses of features in training: penalties in the loss, their attachment to a trainer, the drop-in callback."""
