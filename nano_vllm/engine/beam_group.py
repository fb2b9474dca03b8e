"""The beams of one request, as sequences."""


class BeamGroup:
    pass
