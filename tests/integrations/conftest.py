import integrations.torchvision_for_cpu  # noqa: F401
