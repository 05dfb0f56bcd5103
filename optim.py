import torch
# stopgap, replaced by the real one
def orth(G, dtype):
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall: X = X.mT
    X = X / (X.norm(dim=(-2,-1), keepdim=True)*1.01 + 1e-6)
    for a,b,c in [(8.156554524902461,-22.48329292557795,15.878769915207462),(4.042929935166739,-2.808917465908714,0.5000178451051316),(3.8916678022926607,-2.772484153217685,0.5060648178503393),(3.285753657755655,-2.3681294933425376,0.46449024233003106),(2.3465413258596377,-1.7097828382687081,0.42323551169305323)]:
        A = X @ X.mT
        X = a*X + (b*A + c*A@A) @ X
    return (X.mT if tall else X).float()
class Opt:
    def __init__(s, groups, dtype): s.groups=groups; s.dtype=dtype; s.state={}; s.t=0
    def set(s, lr_scale, muon_momentum, muon_weight_decay): s.lr=lr_scale; s.mom=muon_momentum; s.wd=muon_weight_decay
    @torch.no_grad()
    def step(s):
        s.t+=1; sq=0
        for g in s.groups:
            for n,p in g['params']:
                if p.grad is None: p.grad=torch.zeros_like(p)
                sq+=float(p.grad.square().sum())
        for g in s.groups:
            lr=g['lr']*s.lr
            for n,p in g['params']:
                st=s.state.setdefault(n,{})
                if g['kind']=='adamw':
                    b1,b2=g['betas']
                    if not st: st['m']=torch.zeros_like(p); st['v']=torch.zeros_like(p)
                    st['m'].lerp_(p.grad,1-b1); st['v'].lerp_(p.grad.square(),1-b2)
                    p.add_(st['m']/(1-b1**s.t)/((st['v']/(1-b2**s.t)).sqrt()+1e-10),alpha=-lr)
                else:
                    if not st: st['m']=torch.zeros_like(p)
                    st['m'].lerp_(p.grad,1-s.mom)
                    u=orth(p.grad.lerp(st['m'],s.mom),s.dtype)
                    p.mul_(1-lr*s.wd); p.add_(u,alpha=-lr*max(1,p.size(0)/p.size(1))**.5)
        return sq**.5
    def zero_grad(s):
        for g in s.groups:
            for n,p in g['params']: p.grad=None
    def state_dict(s): return {**s.state,'__t':{'t':torch.tensor(s.t)}}
    def load_state_dict(s,d): d=dict(d); s.t=int(d.pop('__t')['t']); s.state=d
def make_optimizer(model, matrix_lr, embedding_lr, unembedding_lr, scalar_lr, weight_decay, compute_dtype):
    dm=(model.config.n_embd/768)**-0.5
    G={k:[] for k in 'muon emb head scal res'.split()}
    for n,p in model.named_parameters():
        k='emb' if 'wte' in n or 'value_embeds' in n else 'head' if 'lm_head' in n else 'scal' if 've_gate' in n or 'x0' in n else 'res' if p.ndim==1 else 'muon'
        G[k].append((n,p))
    return Opt([dict(kind='muon',params=G['muon'],lr=matrix_lr),dict(kind='adamw',params=G['emb'],lr=embedding_lr*dm,betas=(.8,.95)),dict(kind='adamw',params=G['head'],lr=unembedding_lr*dm,betas=(.8,.95)),dict(kind='adamw',params=G['scal'],lr=scalar_lr,betas=(.96,.95)),dict(kind='adamw',params=G['res'],lr=scalar_lr*.01,betas=(.8,.95))],compute_dtype)
