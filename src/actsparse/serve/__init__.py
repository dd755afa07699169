"""A server that speaks the OpenAI protocol: who is decoded when (``engine``), the protocol (``protocol``, ``app``), a page."""
