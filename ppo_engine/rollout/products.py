from contextlib import nullcontext
class Products:
    def __init__(self, model, *, device, dtype): pass
    def refresh(self, rows): pass
    def active(self): return nullcontext()
    def release(self): pass
