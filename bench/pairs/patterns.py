import numpy as np
import torch
import vsa
from vsa.measure import patterns
from vsa.values import checks
from torch.nn import functional
torch.set_num_threads(1)
out='./'
def put(name, sel):
    b=sel.bitmap.cpu().contiguous().numpy().astype(np.uint32) if sel.bitmap.dtype!=torch.int32 else sel.bitmap.cpu().contiguous().numpy().view(np.uint32)
    axes=patterns.chosen_axes(sel).cpu().numpy().astype(np.int32)
    r=[patterns.reuse(sel,t,patterns.chosen_axes(sel).cpu()) for t in (2,3,4)]
    print(name,b.shape,b.dtype,'axes',axes.ravel().tolist(),'reuse',r)
    with open(out+name+'.bits','wb') as f: f.write(axes.tobytes()); f.write(b.tobytes())
def along_t(grid,heads,topk):
    # 75 % in common along t: one choice per column of tiles, of which a quarter is drawn anew in each layer
    g=torch.Generator().manual_seed(1); n=grid.num_tiles; T,H,W=grid.tiles
    base=torch.rand(1,heads,1,H*W,n,generator=g).expand(1,heads,T,H*W,n)
    own=torch.rand(1,heads,T,H*W,n,generator=g)
    x=(base+own*0.12).reshape(1,heads,n,n)
    k=torch.zeros_like(x,dtype=torch.bool)
    return vsa.Selection.from_mask(k.scatter_(-1,x.topk(topk).indices,True),grid)
for ext,heads in (((32,32,32),12),((21,30,52),12)):
    grid=vsa.Grid(ext); topk=checks.top_k(0.125,grid.num_tiles)
    nm=patterns.layer_name(grid)
    for kind in ('random','correlated'):
        put(f'{nm}.{kind}', patterns.selection(kind,grid,heads,topk,torch.device('cpu')))
    put(f'{nm}.columns', along_t(grid,heads,topk))
