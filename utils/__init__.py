"""What training and evaluation share and is true of any segmentation model."""
