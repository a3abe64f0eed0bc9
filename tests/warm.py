"""Processes that need not import everything again: forked from one that has loaded PyTorch, timm and fastai and done
nothing else. For tests of what a program does; those of how it starts take a Python of their own"""
import atexit, gc, json, os, signal, socket, subprocess, sys, tempfile, threading, time
from contextlib import suppress
from pathlib import Path

# ---------------------------------------------------------------- in the process that is forked

def _become(asked):
    "Go on as the program that was asked for, as far as its first line"
    os.chdir(asked['cwd'])
    os.environ.clear()
    os.environ.update(asked['env'])
    sys.stdin,sys.stdout,sys.stderr = open(0), open(1, 'w'), open(2, 'w', buffering=1, errors='backslashreplace')
    sys.__stdin__,sys.__stdout__,sys.__stderr__ = sys.stdin,sys.stdout,sys.stderr
    for s in (signal.SIGINT, signal.SIGCHLD): signal.signal(s, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)   # also under nohup and &
    sys.argv = asked['words']
    paths = asked['env'].get('PYTHONPATH', '').split(os.pathsep)
    sys.path[:1] = ['' if sys.argv[0] == '-c' else str(Path(sys.argv[0]).parent), *[o for o in paths if o]]
    atexit.register(gc.unfreeze)   # or libraries report what they hold as leaks
    exec(asked['before'], {})

def _program(words):
    "Run `-c code` or a file, as `python` does"
    main = sys.modules['__main__'] = type(sys)('__main__')
    if words[0] == '-c': code = compile(words.pop(1), '<string>', 'exec')
    else:
        main.__file__ = words[0]
        code = compile(Path(words[0]).read_bytes(), words[0], 'exec')
    exec(code, main.__dict__)

def _attend(conn):
    "Start one program and tell who asked for it its number, then its exit status"
    data,fds,*_ = socket.recv_fds(conn, 1, 3)
    while not data.endswith(b'\n'): data += conn.recv(65536)
    pid = os.fork()
    if not pid:
        os.setsid()
        conn.close()
        for i,fd in enumerate(fds): os.dup2(fd, i)
    for fd in fds: os.close(fd)
    if not pid: return json.loads(data)
    with suppress(OSError):
        conn.sendall(f'{pid}\n'.encode())
        conn.sendall(f'{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n'.encode())
    os._exit(0)

def _serve(path):
    "What to run, for whoever asks; ends with the process that began it"
    import av, fastai.vision.all, matplotlib.pyplot, sklearn.datasets, timm, torch
    gc.collect()
    gc.freeze()   # or each collection in each program would look through the imports
    parent,here = os.getppid(),socket.socket(socket.AF_UNIX)
    here.bind(path+'.new')
    here.listen()
    here.settimeout(1)
    os.rename(path+'.new', path)
    while os.getppid() == parent:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]: pass
        with suppress(TimeoutError):
            conn,_ = here.accept()
            if not os.fork():
                here.close()
                conn.setblocking(True)
                return _attend(conn)
            conn.close()
    os._exit(0)

# ---------------------------------------------------------------- in the process that asks

class Program:
    "As much of `subprocess.Popen` as the tests use"
    def __init__(self, path, words, cwd, env, before='', stdin=subprocess.DEVNULL, stdout=None, stderr=None):
        self.args,self.returncode,ours = words,None,[]
        def end(to, i):
            if to is subprocess.DEVNULL: fd = os.open(os.devnull, os.O_RDWR)
            elif to is subprocess.PIPE:
                fd,kept = os.pipe() if i == 0 else os.pipe()[::-1]
                setattr(self, ('stdin','stdout','stderr')[i], open(kept, 'w' if i == 0 else 'r'))
            else: fd = os.dup(i if to is None else to if isinstance(to, int) else to.fileno())
            ours.append(fd)
            return fd
        self.conn = socket.socket(socket.AF_UNIX)
        self.conn.connect(path)
        asked = dict(words=[*map(str, words)], cwd=str(cwd), env=dict(env), before=before)
        socket.send_fds(self.conn, [(data := json.dumps(asked).encode()+b'\n')[:1]],
                        [end(o, i) for i,o in enumerate((stdin, stdout, stderr))])
        self.conn.sendall(data[1:])
        for fd in ours: os.close(fd)
        self.answer = self.conn.makefile('r')
        self.pid = int(self.answer.readline())

    def wait(self, timeout=300):
        if self.returncode is None:
            self.conn.settimeout(timeout)
            try: self.returncode = int(self.conn.recv(32))
            except (TimeoutError, BlockingIOError): raise subprocess.TimeoutExpired(self.args, timeout) from None
        return self.returncode

    def poll(self):
        with suppress(subprocess.TimeoutExpired): self.wait(0)
        return self.returncode

    def send_signal(self, sig): os.kill(self.pid, sig)

    def communicate(self, timeout=300):
        said = {}
        def read(name): said[name] = getattr(self, name).read()
        readers = [threading.Thread(target=read, args=(o,), daemon=True) for o in ('stdout','stderr')
                   if hasattr(self, o)]
        for o in readers: o.start()
        for o in readers: o.join(timeout)
        self.wait(timeout)
        return said.get('stdout'),said.get('stderr')

class Warm:
    "Starts programs from one process that is made when the first is asked for"
    def __init__(self): self.server = None
    def started(self, words, **kw):
        if not self.server:
            self.folder = tempfile.TemporaryDirectory()
            self.path = str(Path(self.folder.name)/'socket')
            env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'MPLBACKEND': 'agg'}
            self.server = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, self.path], env=env,
                                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            while not os.path.exists(self.path):
                assert self.server.poll() is None
                time.sleep(.05)
        return Program(self.path, words, **kw)

    def run(self, words, cwd, env, input=b'', **kw):
        "As `subprocess.run` with what was printed as text"
        given,to = os.pipe()
        os.write(to, input)   # less than a pipe holds
        os.close(to)
        p = self.started(words, cwd=cwd, env=env, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)
        os.close(given)
        try: out,err = p.communicate(600)
        finally:
            with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(words, p.returncode, out, err)

    def close(self):
        if not self.server: return
        self.server.kill()
        self.server.wait()
        self.folder.cleanup()

if __name__ == '__main__':
    asked = _serve(sys.argv[1])
    _become(asked)
    _program(asked['words'])
