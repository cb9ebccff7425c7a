TORCH_VERSIONS: dict[str, str]
