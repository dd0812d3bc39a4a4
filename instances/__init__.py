"""Instance segmentation on COCO: torchvision's Mask R-CNN with recurrent criss-cross attention (table 8)."""
