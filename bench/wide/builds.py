"""One build's forward: right against fp64, then times and energy. usage: bench.py NAME OUT [--smoke]"""
import ctypes, json, statistics, sys, time
import torch, vsa
from vsa.backends import BACKENDS
from vsa.measure import patterns
from vsa.values.problem import Problem

name, out, smoke = sys.argv[1], sys.argv[2], "--smoke" in sys.argv
device = torch.device("cpu" if smoke else "cuda")
try:
    nvml = ctypes.CDLL("libnvidia-ml.so.1"); nvml.nvmlInit_v2(); handle = ctypes.c_void_p()
    nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
except OSError:
    nvml = None
def joules():
    if nvml is None: return 0.0
    x = ctypes.c_ulonglong(); nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(x)); return x.value / 1e3
def selection(kind, grid, heads, topk):
    if kind != "columns": return patterns.selection(kind, grid, heads, topk, device)
    found = patterns.selection("correlated", grid, heads, topk, device)
    order = torch.arange(grid.num_tiles, device=device).view(grid.tiles).permute(2, 1, 0).flatten()
    return vsa.Selection.from_mask(found.mask()[:, :, order][..., order], grid)
D = 128
backend = BACKENDS["emulated" if smoke else "hopper"]
def problem(grid, heads, chosen, dtype=torch.bfloat16, prefix=0):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, grid.length, heads, D, device=device, dtype=dtype).unbind()
    ints = grid.as_ints()
    return Problem(q, k, v, chosen.bitmap, None, ints, ints, D**-0.5, backend.name)
def run(p, n): return backend.forward(p, n)
def worst(p, grid, chosen):
    o, lse = run(p, grid.num_tiles)[:2]
    mask = chosen.mask()[0]
    tile_of = torch.arange(grid.length, device=device)
    t, h, w = grid.shape
    at = torch.stack(torch.meshgrid(*(torch.arange(x, device=device) for x in (t, h, w)), indexing="ij"), -1).view(-1, 3)
    tt = [4, 4, 4]; _, nh, nw = grid.tiles
    tiles = (at[:, 0] // 4 * nh + at[:, 1] // 4) * nw + at[:, 2] // 4
    err = lerr = 0.0
    g = torch.Generator().manual_seed(1)
    for token in torch.randint(0, grid.length, (48,), generator=g).tolist():
        for head in range(0, p.q.shape[2], 5):
            keys = mask[head, tiles[token]][tiles].nonzero()[:, 0]
            s = (p.k[0, keys, head].double() @ p.q[0, token, head].double()) * D**-0.5
            l = torch.logsumexp(s, 0); want = torch.softmax(s, 0) @ p.v[0, keys, head].double()
            got = o[0, token, head].double()
            err = max(err, ((got - want).norm() / want.norm()).item())
            lerr = max(lerr, abs((lse[0, head, token] - l).item()))
    return err, lerr
rows = []
def say(**row):
    rows.append({"build": name, **row}); print(json.dumps(rows[-1]), flush=True)
    with open(out, "a") as f: f.write(json.dumps(rows[-1]) + "\n")
def measure(p, n):
    call = lambda: run(p, n)
    for _ in range(3): call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    def many(count):
        begin.record(); [call() for _ in range(count)]; end.record(); end.synchronize(); return begin.elapsed_time(end)
    once = many(5) / 5
    many(int(40 / once) + 1); count = int(350 / once) + 1
    j = joules(); ms = many(count); j = joules() - j
    rested = []
    for _ in range(7):
        time.sleep(0.04); begin.record(); call(); end.record(); end.synchronize(); rested.append(begin.elapsed_time(end))
    return ms / count, j / count, statistics.median(rested)
layers = [((8, 12, 12), 2)] if smoke else [((32, 32, 32), 12), ((20, 48, 80), 8)]
for shape, heads in layers:
    grid = vsa.Grid(shape); n = grid.num_tiles
    for kind in ("random", "correlated") + (("columns",) if shape[0] == shape[2] else ()):
        for topk in ([n // 8] if smoke else [64, 16, 32, 128, 256] if n == 512 and kind != "columns" else [n // 8]):
            chosen = selection(kind, grid, heads, topk)
            p = problem(grid, heads, chosen)
            if topk == n // 8:
                err, lerr = worst(p, grid, chosen)
                say(grid=shape, kind=kind, topk=topk, error=err, lse=lerr)
                assert err < 0.01 and lerr < 1e-3, (err, lerr)
            if smoke: continue
            ms, j, rested = measure(p, n)
            flops = 4 * D * 64 * 64 * topk * n * heads
            say(grid=shape, kind=kind, topk=topk, ms=ms, joules=j, rested=rested, tflops=flops / ms / 1e9, rested_tflops=flops / rested / 1e9, pj=j / flops * 1e12)
