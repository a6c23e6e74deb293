"""Writing a model as official checkpoint, Hugging Face folder, torch.export program or ONNX."""
