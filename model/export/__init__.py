"""Export models as official checkpoints, Hugging Face folders, torch.export programs and ONNX files."""
