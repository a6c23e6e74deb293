"""The Mask2Former model: backbones, pixel decoders, transformer decoder, criterion, post-processing."""
