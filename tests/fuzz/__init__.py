"""Random cases of every op, each held against float64: `PYTHONPATH=tests python -m fuzz --help`.

    draw    random sizes, masks, values and memory layouts, among canaries
    cases   one generator of random arguments for each op
    bounds  how far a result may be from float64
    check   runs one case and judges it
    shrink  makes a case that fails smaller, and describes it

A case is known by its op and its seed. Nothing here knows how a kernel works inside.
"""
