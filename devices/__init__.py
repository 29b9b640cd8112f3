"""Device models. They know nothing of KVM; see `devices.ports` for what connects them to a machine."""
