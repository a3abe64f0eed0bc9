"""Videos: exact frames from many codecs, containers and rates; what is damaged is refused or left out by name
(R36-R38); batches that depend on seed and list alone (R40). Every frame of a test video shows its own number in binary,
as eight black and white stripes, so that a wrong frame is seen whatever the codec did to it."""
import multiprocessing, os, random, re, sys, time, warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av, numpy as np, pytest, torch
from av.bitstream import BitStreamFilterContext
from PIL import Image
from matplotlib import pyplot as plt
from torch.testing import assert_close
from revvit.data.loader import UnreadableFile, seeded
from revvit.data.digits import digits
from revvit.use.evaluation import folder_items
from revvit.data.video_file import Video, _scan, is_video
from revvit.data.film import TensorVideo
from revvit.data.clips import (ClipAugment, ClipTransform, TrainClips, _fit, _normalise, _rows, _same_draws, _text,
    clip_classes, clip_dls, clip_files, clip_indices, read_clip_list, view_starts)
from revvit.data.moving_digits import directions, moving_digits, moving_digits_dls
from test_training import same

torch.set_num_threads(1)
NTSC = Fraction(30000, 1001)
CFG = dict(input_size=(3,4,48,64), mean=(0.,)*3, std=(1.,)*3, interpolation='bilinear', crop_pct=1., frame_stride=5)

def stripes(i, size=(48,64)):
    return np.repeat([255*(i>>b&1) for b in range(7, -1, -1)], size[1]//8)[None,:,None].repeat(size[0], 0).repeat(3,
        2).astype(np.uint8)

def write(path, n=40, rate=30, codec='libx264', size=(48,64), times=None, start=0, sound=False, options=None,
          **codec_options):
    "A video of frames numbered from `start`"
    with av.open(str(path), 'w', options=options or {}) as c:
        s = c.add_stream(codec, rate=rate, options={k:str(v) for k,v in codec_options.items()})
        s.height,s.width,s.pix_fmt,s.codec_context.thread_count = *size,'yuv420p',1
        a = c.add_stream('mp2' if path.suffix in ('.mkv','.avi','.ts') else 'aac', rate=48000) if sound else None
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(stripes(start+i, size))
            frame.pts,frame.time_base = (times or range(n))[i],1/Fraction(rate)
            c.mux(s.encode(frame))
        c.mux(s.encode())
        if a:   # a second more than the pictures last
            for k in range(int((n/rate+1)*48000/1152)):
                f = av.AudioFrame.from_ndarray(np.zeros((1,1152), np.float32 if a.format.name=='fltp' else np.int16),
                                               format=a.format.name, layout='mono')
                f.sample_rate,f.pts = 48000,k*1152
                c.mux(a.encode(f))
            c.mux(a.encode())
    return path

def shown(x):
    "Numbers that frames (N, 3, H, W) show"
    w = x.shape[3]//8
    return [int(''.join('01'[o>.5*x.max()] for o in bits), 2) for bits in x.float().mean((1,2))[:,w//2::w]]

@pytest.fixture(scope='module')
def tmp(tmp_path_factory): return tmp_path_factory.mktemp('videos')

# ---------------------------------------------------------------- R36: exact frames

rates = {'25': 25, '29.97': NTSC, '30': 30, '60': 60, '23.976': Fraction(24000,1001), '12.5': Fraction(25,2)}
forms = [(suffix, codec, dict(bf=bf, g=g)
          if 'vpx' not in codec else dict(g=g, deadline='realtime',
                                          **{'auto-alt-ref': 1, 'lag-in-frames': 5 if bf else 0}))
         for suffix,codec in (('mp4','libx264'),('mov','libx264'),('mkv','libx264'),('ts','libx264'),('avi','libx264'),
                              ('flv','libx264'),('mp4','mpeg4'),('avi','mpeg4'),('mkv','mpeg4'),('mpg','mpeg2video'),
                              ('webm','libvpx-vp9'),('webm','libvpx'))
         for bf,g in ((0,250),(2,12)) if not (codec=='mpeg2video' and bf==0)]

@pytest.mark.parametrize('rate', rates)
def test_R36_every_frame_is_itself(tmp, rate):
    """All frames at once, some in any order, and single ones from the end, for each container and codec, with and
    without frames predicted from both sides"""
    wrong,n = [],31
    for suffix,codec,options in forms:
        if codec=='mpeg2video' and rate=='12.5': continue   # MPEG-2 knows no such rate
        path = write(tmp/f'{codec}{options["g"]}.{suffix}', n, rates[rate], codec, **options)
        with Video(path) as v:
            some = [n-1, 3, 3, 0, n//2, 17]
            got = (v.frames, round(v.rate, 2), shown(v.read(range(v.frames))), shown(v.read(some)),
                   [shown(v.read([i]))[0] for i in (30,22,14,6)])
        if got!=(n, round(float(rates[rate]), 2), list(range(n)), some, [30,22,14,6]): wrong.append((path.name, got))
    assert not wrong

def test_R36_sampled_clip_is_the_rule(tmp):
    """Train range and test views against numbers computed here, from the rule: a clip spans stride*T/30 seconds,
    views start at k/V of what is free, indices are floors of even steps, the last frame repeats"""
    def rule(frames, rate, T, stride, at):
        span = stride*T/30*rate
        start = max(frames-span, 0)*at
        exact = [min(max(start+k*(span-1)/(T-1), 0), frames-1) for k in range(T)]
        return exact
    for frames,rate,T,stride,at in ((300,30,16,4,0),(300,30,16,4,.8),(250,25,16,4,.4),(600,59.94,16,4,.2),
                                    (299,29.97,32,3,.6),(40,30,16,4,.5),(2,30,16,4,.3),(150,15,8,8,.99)):
        for got,want in zip(clip_indices(frames, rate, T, stride, at=at), rule(frames, rate, T, stride, at)):
            assert got==int(want) or abs(want-round(want))<1e-4 and abs(got-want)<1+1e-4
    for rate in (25, NTSC, 30, 60):
        path = write(tmp/'views.mp4', 120, rate)
        x = ClipTransform(CFG, views=5)(path)
        assert [shown(o.transpose(0,1)) for o in x]==[clip_indices(120, float(rate), 4, 5, at=k/5) for k in range(5)]
    seen = set()
    for o in range(40):
        random.seed(o)
        seen |= {clip_indices(120, 30., 4, 5, at=random.random())[0]}
    assert min(seen)<10 and 90<max(seen)<=100

def test_R36_too_short_repeats_its_last_frame(tmp):
    x = ClipTransform(CFG, views=2)(write(tmp/'short.mp4', 3))
    assert [shown(o.transpose(0,1)) for o in x]==[[0,2,2,2]]*2

@pytest.mark.parametrize('suffix,codec', [('mp4','libx264'),('mkv','libx264'),('webm','libvpx-vp9')])
def test_R36_uneven_rate_goes_by_time(tmp, suffix, codec):
    "Half a second at 60 frames a second, then two at 10: what is shown at a moment is the frame of that moment"
    times = [*range(30), *range(30, 150, 6)]
    with Video(write(tmp/f'uneven.{suffix}', 50, 60, codec, times=times)) as v:
        got = shown(v.read(range(v.frames)))
        at = [times[k]/60 for k in got]
        moment = [i/v.rate for i in range(v.frames)]
    nearest = [max(t for t in times if t/60<=m+.5/v.rate+1e-3)/60 for m in moment]
    late = [a-b for a,b in zip(at, nearest)]
    assert max(map(abs, late))<=1.01/v.rate and got==sorted(got) and got[0]==0

def test_R36_halfway_frames_have_moments_of_their_own():
    "Stamps between two moments all go up; rounded to even numbers, two frames would share one"
    video = SimpleNamespace(first=1, scale=.5)
    assert [Video._slot(video, t) for t in (2, 4, 6, 8)]==[1, 2, 3, 4]

def test_R36_edit_list_and_sound(tmp):
    """Frames that an mp4 hides at its start are not counted; sound that goes on longer than the pictures is no
    truncation"""
    src = write(tmp/'whole.mp4', 60, g=12, bf=2)
    with av.open(str(src)) as i, av.open(str(tmp/'edited.mp4'), 'w') as o:
        t,shift = o.add_stream_from_template(i.streams.video[0]),None
        for p in i.demux(video=0):
            if p.dts is None: continue
            shift = shift or int(20/(30*p.time_base))
            p.pts -= shift; p.dts -= shift; p.stream = t
            o.mux(p)
    with Video(tmp/'edited.mp4') as v: assert shown(v.read(range(v.frames)))==list(range(20, 60))
    for suffix in ('mp4','mkv','avi','ts'):
        with Video(write(tmp/f'sound.{suffix}', 30, sound=True, bf=0)) as v:
            assert shown(v.read(range(v.frames)))==list(range(30))

def copied(src, path, begin=0., end=9., ticks=None):
    """What `ffmpeg -ss begin -to end -c copy` makes: packets from the key frame before `begin` on, which is moment 0
    of an mp4; `ticks` a frame as it writes them into AVI"""
    with av.open(str(src)) as i, av.open(str(path), 'w') as o:
        s = i.streams.video[0]
        packets = [p for p in i.demux(s) if p.dts is not None and p.dts*p.time_base<end]
        start = max(k for k,p in enumerate(packets) if p.is_keyframe and p.pts*p.time_base<=begin)
        t = o.add_stream_from_template(s)
        if ticks: t.time_base = 1/(s.average_rate*ticks)
        shift = round(begin/s.time_base) if path.suffix=='.mp4' else packets[start].dts
        form = BitStreamFilterContext('h264_mp4toannexb' if path.suffix=='.avi' and s.codec.name=='h264' else 'null', s)
        for p in packets[start:]:
            p.pts -= shift; p.dts -= shift
            for q in form.filter(p):
                q.stream = t
                o.mux(q)
    return path

def on_screen(path, rate, counted):
    """Numbers that are seen at each moment of an even grid when the file is decoded from one end to the other;
    `counted`: one after the other"""
    with av.open(str(path)) as c:
        seen = [(f.pts*f.time_base, f) for f in c.decode(video=0)]
    numbers = shown(torch.stack([torch.from_numpy(f.to_ndarray(format='rgb24')) for _,f in seen]).permute(0,3,1,2))
    if counted: return numbers
    places = [int((t-seen[0][0])*rate+Fraction(1,2)) for t,_ in seen]
    return [numbers[sum(p<=k for p in places)-1] for k in range(places[-1]+1)]

@pytest.mark.parametrize('codec,bf,g', [('libx264',0,12),('libx264',2,12),('libx264',3,250),('mpeg4',2,12)])
def test_R36_cut_without_encoding(tmp, codec, bf, g):
    """From the middle between two key frames and between two frames, to where frames shown later are missing; into
    each container; also where the first frames cannot be shown for want of their base"""
    src,wrong = write(tmp/'src.mp4', 70, 25, codec, bf=bf, g=g),[]
    for begin,end in ((0.,9.), (.52,2.1), (1.33,2.53)):
        for suffix,ticks in (('mp4',None), ('mkv',None), ('ts',None), ('flv',None), ('avi',1), ('avi',2)):
            # FLV does not know it, and a .ts has nowhere to say its size
            if codec=='mpeg4' and suffix in ('flv','ts'): continue
            path = copied(src, tmp/f'cut.{suffix}', begin, end, ticks)
            want = on_screen(path, 25, suffix=='avi')
            with Video(path) as v:
                got = (v.rate, shown(v.read(range(v.frames))), shown(v.read([v.frames-1, 0, v.frames//2])))
            if got!=(25., want, [want[-1], want[0], want[len(want)//2]]):
                wrong.append((begin, suffix, ticks, got, want))
    assert not wrong, (len(wrong), wrong[:2])

@pytest.mark.parametrize('rate', [25, NTSC])
def test_R36_last_frame_without_duration(tmp, rate):
    "Sorenson's codec in FLV: no packet says how long its frame is shown, the last is a frame all the same"
    with Video(write(tmp/'sorenson.flv', 40, rate, 'flv', g=12, qmin=2, qmax=2)) as v:
        assert (v.frames, shown(v.read(range(v.frames))))==(40, list(range(40)))

def test_R36_turned_video(tmp):
    for degrees,size in ((90,(64,48)),(180,(48,64)),(-90,(64,48))):
        with av.open(str(tmp/'turned.mp4'), 'w') as c:
            s = c.add_stream('libx264', rate=30)
            s.height,s.width,s.pix_fmt = 48,64,'yuv420p'
            s.set_display_rotation(degrees)
            for i in range(4): c.mux(s.encode(av.VideoFrame.from_ndarray(stripes(37))))
            c.mux(s.encode())
        with Video(tmp/'turned.mp4') as v: x = v.read([3])
        assert x.shape[2:]==size and shown(x.rot90(-degrees//90, (2,3)))==[37]

@pytest.mark.parametrize('name', ['-dash.mp4', 'a:b.mp4', 'http:.mp4', 'per%03dcent.mp4', 'two\nlines.mp4',
                                  "quo'te\".mp4", 'ünï 視頻.mp4', 'concat:x|y.mp4'])
def test_R36_any_name(tmp, name, monkeypatch):
    (tmp/'plain.mp4').exists() or write(tmp/'plain.mp4')
    (tmp/name).write_bytes((tmp/'plain.mp4').read_bytes())
    monkeypatch.chdir(tmp)
    for path in (name, tmp/name):
        with Video(path) as v: assert shown(v.read([5]))==[5]
    assert is_video(name)

def test_R36_a_title_in_any_encoding(tmp):
    "PyAV reads it as UTF-8, which that of an old tool may not be"
    path = tmp/'titled.mkv'
    with av.open(str(path), 'w') as c:
        c.metadata['title'] = 'ABCDEF'
        s = c.add_stream('mpeg4', rate=24)
        s.width,s.height,s.pix_fmt = 32,32,'yuv420p'
        for i in range(3): c.mux(s.encode(av.VideoFrame.from_ndarray(stripes(i, (32,32)), format='rgb24')))
        c.mux(s.encode())
    raw = path.read_bytes()
    assert b'ABCDEF' in raw
    path.write_bytes(raw.replace(b'ABCDEF', 'élève!'.encode('latin1')))
    with Video(path) as v: assert v.frames==3

def packets(*times, duration=10):
    "An open container without a file, whose packets have these time stamps; those before 0 are there to be built upon"
    found = [SimpleNamespace(pts=t, dts=None, duration=duration, is_discard=t<0, is_corrupt=False,
                             time_base=Fraction(1,100), stream_index=0) for t in times]
    form = SimpleNamespace(name='flv')
    return SimpleNamespace(demux=lambda: found, duration=None, start_time=0, format=form), SimpleNamespace(index=0)

def test_R36_packets_out_of_order():
    "Two of five are not shown; without durations the last frame is shown as long as the others are on average"
    assert _scan(*packets(-20, -10, 0, 20, 10))==(3, 0, 30, 0.)
    assert _scan(*packets(-20, -10, 0, 20, 10, duration=0))[:3]==(3, 0, 30.)

def test_R36_jumps_to_the_key_frame_before(tmp):
    with Video(write(tmp/'twelve.mp4', 90, g=12, sc_threshold=0)) as v:
        assert [next(v._from(o))[0] for o in (50,48,47,None)]==[48,48,36,0]
        got = v._walk([3,4,40], 3)
        assert {k: shown(torch.from_numpy(o.copy()).permute(2,0,1)[None])[0] for k,o in got.items()}=={3:3, 4:4, 40:40}
        assert v._walk([3,40], 30) is None   # a start that lies behind what is wanted
        with pytest.raises(UnreadableFile, match='twelve.mp4: the video stops after 90 of 90 frames, it is truncated '
                                                 'or damaged'):
            v._walk([3,95], None)

@pytest.mark.parametrize('indices', [[40], [0,-1], []])
def test_R36_no_such_frame(tmp, indices):
    with Video(write(tmp/'forty.mp4', 40)) as v, pytest.raises(ValueError, match='forty.mp4: frames must be from 0 to '
        '39, got '):
        v.read(indices)

def test_R36_is_closed_at_the_end_of_the_block(tmp, monkeypatch):
    path = write(tmp/'closed.mp4')
    with pytest.raises(ZeroDivisionError), Video(path) as v: 1/0
    with pytest.raises(AssertionError): next(v.container.decode(video=0))
    class Odd(Exception): pass
    def fails(self): raise Odd
    monkeypatch.setattr(Video, '_measure', fails)
    with pytest.raises(Odd): Video(path)

# ---------------------------------------------------------------- R36: what cannot be read

@pytest.mark.parametrize('name,video', [('a.mp4',True), (Path('b/C.MOV'),True), ('a.mp4.txt',False), ('mp4',False),
                                        ('a.png',False), ('a.gif',False)])
def test_R36_names_of_videos(name, video): assert is_video(name)==video

def test_R36_damage_that_no_decoder_conceals(tmp):
    raw = bytearray(write(tmp/'fast.mp4', 90, options=dict(movflags='faststart')).read_bytes())
    raw[len(raw)//2:len(raw)*2//3] = bytes(len(raw)*2//3-len(raw)//2)
    (path := tmp/'damaged.mp4').write_bytes(raw)
    def read(path):
        with Video(path) as v: v.read([0])
    assert sentence(path, read).startswith('the video cannot be decoded, it is damaged')

def sentence(path, call):
    "The refusal: one line that begins with the path"
    with pytest.raises((UnreadableFile, FileNotFoundError)) as e: call(path)
    said = str(e.value)
    assert said.startswith(f'{path}: ') and '\n' not in said[len(str(path)):] and len(said)<len(str(path))+120, said
    return said[len(str(path))+2:]

def bad_files(folder):
    "Name and content of files that are no videos, and what is said of them"
    silence = av.AudioFrame.from_ndarray(np.zeros((1,4096), np.float32), format='fltp', layout='mono')
    silence.sample_rate = 8000
    with av.open(str(folder/'sound.mp4'), 'w') as c:
        s = c.add_stream('aac', rate=8000)
        c.mux(s.encode(silence)); c.mux(s.encode())
    with av.open(str(folder/'no frames.mkv'), 'w') as c:
        s = c.add_stream('mpeg4', rate=30); s.height = s.width = 32; s.pix_fmt = 'yuv420p'
        c.start_encoding()
    for k in ('mp4','mkv','avi'): write(folder/f'one.{k}', 1, codec='mpeg4')
    Image.fromarray(stripes(3)).save(folder/'picture.jpg'); (folder/'picture.jpg').rename(folder/'picture.mp4')
    Image.fromarray(stripes(3)).save(folder/'picture.png'); (folder/'picture.png').rename(folder/'picture.webm')
    (folder/'zero.mp4').touch(); (folder/'folder.mp4').mkdir()
    (folder/'page.mp4').write_text('<!doctype html><title>404</title>'*50)
    (folder/'story.txt').write_text('once upon a time\n'*500)
    (folder/'noise.mp4').write_bytes(np.random.RandomState(0).bytes(5000))
    (folder/'lfs.mp4').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\n')
    (folder/'list.mp4').write_text('ffconcat version 1.0\nfile one.mp4\n')
    lines = '#EXTM3U', '#EXT-X-TARGETDURATION:9', '#EXTINF:9,', 'http://localhost:1/a.ts', '#EXT-X-ENDLIST', ''
    (folder/'play.m3u8').write_text('\n'.join(lines))
    whole = write(folder/'whole.mp4').read_bytes(); (folder/'no index.mp4').write_bytes(whole[:len(whole)//2])
    said = {'sound.mp4': 'there is sound in it but no video', 'zero.mp4': r'the video file is empty \(0 bytes\)',
            'folder.mp4': 'a folder, not a video file', 'missing.mp4': 'no such video file',
            'no index.mp4': 'the video has no index, it is probably truncated'}
    return {**said, **{f'one.{k}': 'a video of 1 frame, at least 2 are needed' for k in ('mp4','mkv','avi')},
            'picture.mp4': '', 'picture.webm': '', 'no frames.mkv': '', 'page.mp4': 'not a video',
            'story.txt': 'not a video', 'noise.mp4': 'not a video', 'lfs.mp4': 'not a video', 'list.mp4': 'not a video',
            'play.m3u8': ''}

def test_R36_no_video_one_sentence(tmp):
    (folder := tmp/'bad').mkdir()
    for name,said in bad_files(folder).items():
        assert re.match(said, sentence(folder/name, Video)), name
        sentence(folder/name, ClipTransform(CFG))

@pytest.mark.skipif(os.name!='posix' or os.geteuid()==0, reason='everything may be read here')
def test_R36_no_permission(tmp):
    write(tmp/'locked.mp4').chmod(0)
    assert 'permission' in sentence(tmp/'locked.mp4', Video)

@pytest.mark.parametrize('suffix,codec,options', [('mp4','libx264',{}),('mp4','libx264',dict(movflags='faststart')),
                                                  ('mp4','mpeg4',dict(movflags='frag_keyframe+empty_moov')),
                                                  ('mkv','libx264',{}),('webm','libvpx-vp9',{}),('avi','mpeg4',{})])
def test_R36_truncated_anywhere(tmp, suffix, codec, options):
    """Cut at 15 places a file is refused, or what it says to have is right: then less than a quarter of a second is
    gone, or more of a fragmented mp4, which cannot know"""
    raw,refused,fragmented = write(tmp/f'full.{suffix}', 60, codec=codec, options=options,
                                   g=10).read_bytes(),0,'empty_moov' in str(options)
    for part in np.linspace(.02, .97, 15):
        (cut := tmp/f'cut.{suffix}').write_bytes(raw[:int(len(raw)*part)])
        try:
            with Video(cut) as v:
                assert 'faststart' not in str(options), 'its index says at once that it is cut'
                n,x = v.frames,v.read(range(v.frames))
        except UnreadableFile as e: refused += str(e).startswith(f'{cut}: ')
        else: assert shown(x)==list(range(n)) and (n>=60-9 or fragmented)
    assert refused>=(5 if fragmented else 12)

def test_R36_flipped_bytes_never_surprise(tmp):
    "A video with garbage inside gives all its frames, or the sentence; no other error, no other number of frames"
    rng,kinds = np.random.RandomState(0),set()
    for suffix,codec in (('mp4','libx264'),('mkv','mpeg4'),('webm','libvpx-vp9')):
        raw = write(tmp/f'good.{suffix}', 40, codec=codec).read_bytes()
        for k in range(12):
            bad = bytearray(raw); at = rng.randint(40, len(raw)-40)
            bad[at:at+30] = rng.bytes(30)
            (path := tmp/f'garbage.{suffix}').write_bytes(bad)
            try:
                with Video(path) as v: kinds.add(tuple(v.read(range(0, min(v.frames, 60), 3)).shape[1:])==(3,48,64))
            except UnreadableFile as e: kinds.add(str(e).startswith(f'{path}: '))
    assert kinds=={True}

# ---------------------------------------------------------------- clips

SMALL = dict(input_size=(3,4,8,8), mean=(0.,)*3, std=(1.,)*3, interpolation='bilinear', crop_pct=1.)

@pytest.mark.parametrize('change,said', [(dict(input_size=(3,224,224)), r'clips need an input_size of \(3, frames, '
                                          r'height, width\), got \(3, 224, 224\)'),
    (dict(input_size=(1,4,8,8)), r'got \(1, 4, 8, 8\)'), (dict(mean=(.5,)), 'must have one value for each of 3 '
        'channels')])
def test_settings_that_do_not_fit(change, said):
    for kind in (ClipTransform, ClipAugment):
        with pytest.raises(ValueError, match=said): kind({**SMALL, **change})

def test_settings_and_what_they_lack():
    assert ClipTransform(SMALL).cfg=={**SMALL, 'frame_stride':4, 'frame_rate':30.}
    assert ClipTransform({**SMALL, 'frame_stride':2}).cfg['frame_stride']==2
    with pytest.raises(ValueError, match='clip settings lack crop_pct, interpolation, mean, std'):
        ClipTransform(dict(input_size=(3,4,8,8)))

@pytest.mark.parametrize('views,starts', [(1,[.5]), (2,[0,.5]), (5,[0,.2,.4,.6,.8])])
def test_where_views_start(views, starts): assert view_starts(views)==starts

@pytest.mark.parametrize('args,want', [((300,30), [0,4,8,12,16,21,25,29,33,37,42,46,50,54,58,63]),
    ((2,1), [0]*14+[1]*2), ((10,60,1), [0]),
    ((30,30), [0,4,8,12,16,21,25,29,*[29]*8])])
def test_frames_of_a_clip(args, want): assert clip_indices(*args, at=0)==want

@pytest.mark.parametrize('frames,size,pct', [((20,90),(10,6),1.), ((300,301),(224,224),1.), ((40,40),(224,224),.875),
                                             ((512,700),(224,224),.875)])
@pytest.mark.parametrize('how', ['bilinear','bicubic'])
def test_frames_of_any_size_fit(frames, size, pct, how):
    assert _fit(torch.zeros(2,3,*frames), size, pct, how).shape==(2,3,*size)

def test_prepared_frames_are_only_cut():
    x = torch.randint(0, 256, (1,3,256,341), dtype=torch.uint8)
    assert torch.equal(_fit(x, (224,224), .875, 'bicubic'), x[:,:,16:240,59:283])

def test_normalised_by_hand():
    x = torch.tensor([0,51,102,255]).byte().view(2,2,1,1,1).expand(2,2,3,5,4)   # V T 3 H W
    y = _normalise(x, dict(mean=(0.,.2,.2), std=(1.,1.,2.)))
    want = torch.tensor([[[0.,.2],[-.2,0.],[-.1,0.]],[[.4,1.],[.2,.8],[.1,.4]]])
    assert_close(y[...,0,0], want, rtol=0, atol=1e-6)
    assert y.is_contiguous()

@pytest.mark.parametrize('suffix,codec', [('mp4','libx264'), ('webm','libvpx-vp9'), ('avi','mpeg4'), ('ts','libx264')])
def test_R36_views_of_each_container(tmp, suffix, codec):
    path = write(tmp/f'views.{suffix}', 40, 25, codec)
    want = [clip_indices(40, 25, 4, 5, at=k/3) for k in range(3)]
    assert [shown(o.transpose(0,1)) for o in ClipTransform(CFG, views=3)(path)]==want

# ---------------------------------------------------------------- the same change for every frame

LARGE = dict(input_size=(3,16,64,64), mean=(.45,)*3, std=(.225,)*3, interpolation='bilinear', crop_pct=.875)
NOTHING = dict(color_jitter=0., scale=(1.,1.), ratio=(1.,1.), hflip=0.)
RAND = dict(rand_aug='rand-m7-n4-mstd0.5-inc1')

def test_frames_have_the_same_draws():
    def noisy(o): return o, random.random(), np.random.rand()
    with seeded(0): a,b = _same_draws(noisy, [1,2,3]),_same_draws(noisy, [1])
    assert a==[(o, *a[0][1:]) for o in (1,2,3)] and a[0]!=b[0]

def test_steps_are_the_published_ones():
    aug = ClipAugment(LARGE, **RAND)
    ops = aug.rand_augment(256)
    assert (ops.num_layers, {(o.magnitude, o.magnitude_std, o.prob) for o in ops.ops})==(4, {(7,.5,.5)})
    assert {o.kwargs['resample'] for o in ops.ops}=={Image.Resampling.BICUBIC}
    assert {'PosterizeIncreasing','SolarizeAdd','TranslateYRel'}<={o.name for o in ops.ops}
    assert (aug.crop.scale, aug.crop.ratio, aug.crop.size, aug.crop.interpolation.value,
            aug.flip.p)==((.08,1.), (3/4,4/3), (64,64), 'bilinear', .5)
    assert (aug.erase.probability, aug.erase.per_pixel, aug.erase.min_count, aug.erase.max_count,
            aug.jitter)==(.25, True, 1, 1, None)
    assert ClipAugment(LARGE).jitter.brightness==(.6,1.4)

@pytest.mark.parametrize('kw', [RAND, {}, dict(color_jitter=0.)], ids=['RandAugment','jitter','neither'])
def test_still_frames_stay_still(kw):
    "Through everything but the noise, whatever is drawn; other draws give another clip"
    still,seen = torch.from_numpy(stripes(41, (96,128))).permute(2,0,1).repeat(16,1,1,1),set()
    for k in range(8):
        with seeded(k): x = ClipAugment(LARGE, erase=0., **kw)(still)
        assert (x.shape, x.dtype)==((3,16,64,64), torch.float32) and torch.equal(x, x[:,:1].expand_as(x))
        seen.add(x[:,0].numpy().tobytes())
    assert len(seen)>6

def test_box_of_noise():
    "The same place in all frames, other numbers in each, of mean 0 and variance 1"
    with seeded(0): x = ClipAugment(LARGE, erase=1., **NOTHING)(torch.full((16,3,64,64), 115, dtype=torch.uint8))
    box = (x-(115/255-.45)/.225).abs()>1e-5
    assert (box==box[:1,:1]).float().mean()>.999 and .02<=box.float().mean()<=.34
    noise = x[box].reshape(-1)
    assert abs(noise.mean())<.05 and abs(noise.std()-1)<.05 and len(noise.unique())>.99*len(noise)

def test_share_of_boxes():
    black,aug = torch.zeros(1,3,64,64, dtype=torch.uint8),ClipAugment(LARGE, **NOTHING)
    with seeded(0): erased = sum(bool((aug(black)>-1.9).any()) for _ in range(200))
    assert 30<erased<70   # of 200, with a share of 0.25

def test_with_everything_off_the_clip_is_the_frames():
    frames = torch.randint(0, 256, (16,3,64,64), dtype=torch.uint8)
    assert_close(ClipAugment(LARGE, erase=0., **NOTHING)(frames)*.225+.45, frames.transpose(0,1)/255, rtol=0, atol=1e-6)

def test_strips_of_film():
    clip = TensorVideo(torch.rand(2,3,4,6,5))
    shapes = [o.get_images()[0].get_array().shape
              for o in (clip.show(), clip[0].show(max_frames=3), clip[0].repeat(1,1,1,8).show())]
    plt.close('all')
    assert shapes==[(12,20,3), (6,15,3), (6,4*42,3)] and type(clip[0].flatten(0, 1)) is TensorVideo

def test_moments_are_anywhere_and_the_same_for_all_repeats(tmp):
    read = TrainClips(CFG, lambda o: o.transpose(0,1).float(), repeats=2)
    path = write(tmp/'moments.mp4', 90)
    with seeded(0): clips = [read(path) for _ in range(60)]
    starts = [[shown(o.transpose(0,1))[0] for o in c] for c in clips]
    assert clips[0].shape==(2,3,4,48,64) and all(a==b for a,b in starts)
    assert 0<=min(starts)[0]<6 and 64<max(starts)[0]<=70      # 90 frames, the clip spans 20
    small = TrainClips(dict(CFG, input_size=(3,4,24,32)), lambda o: o.transpose(0,1).float())
    assert small(path).shape==(1,3,4,32,42)
    with pytest.raises(UnreadableFile, match='gone.mp4: no such video file'): read(tmp/'gone.mp4')

# ---------------------------------------------------------------- lists and loaders

kinds = [('mp4','libx264',30,(48,64)), ('webm','libvpx-vp9',25,(48,64)), ('mkv','mpeg4',24,(64,48)),
         ('avi','mpeg4',30,(48,64)), ('mov','libx264',NTSC,(64,96)), ('mp4','mpeg4',60,(48,64))]

def fill(folder, train=12, val=4):
    "A Kinetics-style data set of two classes: frames of the second are numbered from 128"
    folder.mkdir(parents=True)
    for part,n in (('train',train),('val',val)):
        names = [f'{part} ünï {i}.{kinds[i%6][0]}' for i in range(n)]
        for i,name in enumerate(names):
            write(folder/name, 20+i, kinds[i%6][2], kinds[i%6][1], kinds[i%6][3], start=128*(i%2))
        (folder/f'{part}.csv').write_text('\n'.join(f'{o} {i%2}' for i,o in enumerate(names)), encoding='utf8')
    return folder

@pytest.fixture(scope='module')
def data(tmp): return fill(tmp/'my data')

def numbers(frames): return torch.tensor(shown(frames)).view(1,-1,1,1).float()
def dls(data, **kw): return clip_dls(data, CFG, **{**dict(bs=4, workers=0, device='cpu', tfm=numbers), **kw})
def batches(dl): return [tuple(o.as_subclass(torch.Tensor) for o in b) for b in dl]
def quiet(call):
    "The answer, and what was warned"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always', UserWarning)
        return call(), [str(o.message) for o in said if o.category is UserWarning]

@pytest.mark.parametrize('workers', [0,2])
def test_what_a_learner_may_be_asked(data, workers):
    "`test_dl` of paths and prepared tensors, mixed: the clip of the file; what has no rate of frames is refused"
    loader = dls(data, workers=workers)
    files = [*loader.held]
    want = torch.stack([ClipTransform(CFG)(f)[0] for f in files])
    items = [f if i%3 == 0 else Path(f) if i%3 == 1 else want[i] for i,f in enumerate(files)]
    x, = map(torch.cat, zip(*batches(loader.test_dl(items))))
    assert torch.equal(x, want)
    for item in (Image.new('RGB', (64,48)), np.zeros((4,48,64,3), np.uint8)):
        with pytest.raises(ValueError, match='expected a video file, or a prepared tensor'):
            loader.test_dl([item], num_workers=0).one_batch()

@pytest.mark.parametrize('workers', [0,2])
def test_R36_policy_raise_or_skip_never_another_label(data, tmp, workers):
    """One torn, one empty and one missing video: named at once or left out and counted; the numbers in every clip
    still say its label"""
    (torn := tmp/f'torn{workers}').mkdir()
    for o in data.iterdir(): (torn/o.name).write_bytes(o.read_bytes())
    f = torn/'train ünï 3.avi'; f.write_bytes(f.read_bytes()[:f.stat().st_size//2])
    with pytest.raises(UnreadableFile, match=r'train ünï 3\.avi: '): batches(dls(torn, workers=workers).train)
    (torn/'train ünï 6.mp4').write_bytes(b''); (torn/'train ünï 9.avi').unlink()
    with pytest.raises(UnreadableFile, match=r'train ünï 6\.mp4: the video file is empty \(0 bytes\) \(and 1 more such '
                                             r'files\)'): dls(torn)
    with pytest.raises(UnreadableFile, match=r'train ünï \d\.\w+: '):
        batches(dls(torn, check=False, workers=workers).train)
    d,said = quiet(lambda: dls(torn, on_bad='skip', workers=workers))
    assert len(said)==1 and said[0].startswith('2 unreadable files are left out: ') and len(d.train_ds)==10
    for d in (d, dls(torn, on_bad='skip', workers=workers, check=False)):
        got,said = quiet(lambda: batches(d.train))
        bad = sorted(Path(o).name for o in d.train.bad_items())
        assert bad==['train ünï 3.avi'] if len(d.train_ds)==10 else set(bad)<={'train ünï 3.avi','train ünï 6.mp4',
            'train ünï 9.avi'} and bad
        assert any(f'{len(bad)} of {len(d.train_ds)} items cannot be read and are left out: ' in o for o in said)
        x,y = map(torch.cat, zip(*got))
        assert ((x.flatten(1)>=128).long()==y[:,None]).all()

def test_batches_have_all_clips_of_a_video_or_its_views(data):
    d = dls(data, tfm=None, repeats=2, bs=2)
    assert [tuple(o.shape) for o in d.one_batch()]==[(4,3,4,48,64), (4,)]
    x,y = d.train.one_batch()
    assert y[::2].tolist()==y[1::2].tolist() and type(x) is TensorVideo
    assert [len(o.valid.one_batch()[0].shape) for o in (dls(data), dls(data, views=2))]==[5,6]

def test_shown_clips_have_their_colours_back(data):
    d = clip_dls(data, {**CFG, 'mean': (.2,.3,.4), 'std': (.5,)*3}, bs=4, workers=0, device='cpu')
    b = d.valid.one_batch()
    want = b[0].as_subclass(torch.Tensor)*.5+torch.tensor([.2,.3,.4]).view(3,1,1,1)
    assert_close(d.valid.decode(b)[0].as_subclass(torch.Tensor), want.clip(0,1), rtol=0, atol=1e-6)

@pytest.mark.parametrize('kw,said', [(dict(bs=13), '^12 training files are too few for a batch of 13: batch_size=12 or '
                                                   'less would work'), (dict(aug={'hflip': 0.}), 'give one of the two'),
    (dict(repeats=0), 'repeats must be at least 1, got 0'), (dict(views=0), 'views must be at least 1, got 0'),
    (dict(on_bad='hide'), "on_bad must be 'raise' or 'skip'"),
    (dict(valid='other.csv'), 'other.csv: no such list of videos'), (dict(root='/nowhere'), r'/nowhere/train ünï '
        r'0.mp4: no such video file \(and 15 more such files\)')])
def test_R38_settings_that_cannot_work(data, kw, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said): dls(data, **kw)

class Mine(Exception): pass

@pytest.mark.parametrize('workers', [0,1])
def test_R37_own_mistakes_keep_their_type_and_name_the_file(data, workers):
    for kind in (TypeError, ZeroDivisionError, Mine) if workers else (TypeError, KeyError, IndexError, AssertionError,
        MemoryError, Mine):
        def wrong(frames): raise kind('my mistake')
        dl = dls(data, tfm=wrong, workers=workers, on_bad='skip').train
        with pytest.raises(kind, match=r'train ünï \d+\.\w+: my mistake'): batches(dl)

def test_R38_lists(tmp):
    "Each mistake is found before anything is decoded, and says list and line"
    path = tmp/'list.csv'
    for text,said in {'': ': the list is empty', '\n\n  \n': ': the list is empty',
                      'a.mp4': ", line 1: expected `path label`, got 'a.mp4'",
                      'a.mp4 0\nb.mp4 -1': ", line 2: the label must be a whole number from 0 up, got '-1'",
                      'a.mp4 1.0': "got '1.0'", 'a.mp4 cat': "got 'cat'", 'a.mp4 1e3': "got '1e3'",
                      'a.mp4 ٣': "got '٣'", 'a.mp4 7': ', line 1: the label must be below 7, got 7',
                      'a.mp4 999999999999999999999': 'must be below 7',
                      'a.mp4 0\nb.mp4 0\na.mp4 1': ", line 3: 'a.mp4' is already in line 1, with another label",
                      'a.mp4 0\n./a.mp4 1': ", line 2: './a.mp4' is already in line 1, with another label",
                      '"a.mp4 0': ', line 1: the quotes do not match', '"a"b 0': 'the quotes do not match',
                      'a.mp4\t0': 'expected `path label`', 'a.mp4,0': 'expected `path label`',
                      '"x\ny.mp4" 0\nb.mp4 9': ', line 3: the label must be below 7, got 9'}.items():
        path.write_text(text, encoding='utf8')
        with pytest.raises(ValueError) as e: read_clip_list(path, classes=7)
        assert (str(e.value).startswith(str(path)) and said in str(e.value)
                and str(e.value).count('\n')<=text.count('x\ny')), (text, str(e.value))
    for text,said in ((b'caf\xe9.mp4 1', 'not a text file in UTF-8 (invalid continuation byte at byte 3)'),
                      ('a.mp4 0\n'.encode('utf-16'), 'not a text file in UTF-8 (invalid start byte at byte 0)'),
                      ('ä.mp4 0\n'.encode('utf-16-le'), 'not a text file in UTF-8 (invalid'),
                      (b'\x89PNG\r\n\x1a\nIHDR', 'not a text file in UTF-8 (invalid start byte at byte 0)'),
                      (b'my cat.mp4 0\na b', "line 2: the label must be a whole number from 0 up, got 'b'"),
                      (' a.mp4 ²'.encode(), "line 1: the label must be a whole number from 0 up, got '²'")):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=re.escape(said)): read_clip_list(path)
    with pytest.raises(FileNotFoundError, match='none.csv: no such list of videos'): read_clip_list(tmp/'none.csv')
    path.write_text('a.mp4 3\n\nmy cat.mp4  0 \n"sub/the ""cat"".mp4" 1\r\n"two\nlines.mp4" 2\nlast.mp4')
    assert list(_rows(path, *_text(path)[:1]))==[(1,'a.mp4','3'), (3,'my cat.mp4','0'), (4,'sub/the "cat".mp4','1'),
                               (5,'two\nlines.mp4','2'), (7,'','last.mp4')]
    path.write_bytes('\ufeffa.mp4 0\r\nb c.mp4  1 \r\n'.encode())
    assert {os.path.relpath(k, tmp): v for k,v in read_clip_list(path).items()}=={'a.mp4': 0, 'b c.mp4': 1}

@pytest.mark.parametrize('name', ['a b.mp4', '"quo""ted"" too.mp4"', '"two\nlines.mp4"', 'ünï/視頻.mp4',
                                  '"sub/../x y.mp4"'])
def test_R38_paths_end_to_end(tmp, name):
    """Spaces, quotes, line breaks and other alphabets, relative and absolute, with and without a root: the right
    video comes"""
    real,folder = name.strip('"').replace('""', '"'),tmp/f'paths{abs(hash(name))}'
    (folder/real).parent.mkdir(parents=True, exist_ok=True)
    (folder/'sub').mkdir(exist_ok=True)
    write(folder/real, 20, start=77)
    write(folder/'other.mp4', 20); write(folder/'held.mp4', 20, start=5); write(folder/'held too.mp4', 20, start=6)
    absolute = f'{folder}/{real}'.replace('"', '""')
    for line,root in ((name, None), (name, folder), (f'"{absolute}"', '/nowhere')):
        (folder/'train.csv').write_text(f'{line} 1\n{folder}/other.mp4 0', encoding='utf8')
        (folder/'val.csv').write_text(f'{folder}/held.mp4 0\n"{folder}/held too.mp4" 1')
        d = dls(folder, bs=2, root=root)
        got = {int(y): int(x.min())>=77 for x,y in d.train_ds}
        assert got=={0: False, 1: True}
        assert sorted(os.path.basename(o) for o in d.train_ds.items)==sorted(['other.mp4', os.path.basename(real)])

def test_R38_classes(data, tmp):
    lists = {k: (data/f'{k}.csv').read_text(encoding='utf8').splitlines() for k in ('train','val')}
    def says(train=lists['train'], val=lists['val'], classes=None):
        (data/'t.csv').write_text('\n'.join(train), encoding='utf8')
        (data/'v.csv').write_text('\n'.join(val), encoding='utf8')
        if classes: (data/'classes.txt').write_text(classes, encoding='utf8')
        try:
            with pytest.raises(ValueError) as e: clip_files(data, 't.csv', 'v.csv')
        finally: (data/'classes.txt').unlink(missing_ok=True)
        return str(e.value).replace(f'{data}{os.sep}', '')
    assert says(train=lists['train'][::2])=="t.csv: no video of the class '1'"
    assert says(val=lists['val'][1::2], classes='cat\nbig dog')=="v.csv: no video of the class 'cat'"
    assert says(classes='cat\ndog\ncow')=="t.csv: no video of the class 'cow'"
    assert says(classes='cat')=='classes.txt: names 1 classes, the lists have 2'
    assert says(classes='cat\ncat')=="classes.txt: the class 'cat' is named twice"
    assert (says(train=[*lists['train'], 'train ünï 0.mp4 1'])=="t.csv, line 13: 'train ünï 0.mp4' is already in line "
            "1, with another label")
    assert 'is in \'t.csv\' too' in says(val=[*lists['val'], lists['train'][0]])
    assert clip_classes(tmp, 3)==['0','1','2'] and [clip_classes(tmp, 400)[i] for i in (0,399)]==['abseiling','zumba']
    assert says(train=[*lists['train'], 'gone.mp4 1'])=='gone.mp4: no such video file'

@pytest.mark.parametrize('again', [['0.mp4 0'], ['./0.mp4 0'], ['"1.mp4" 1', '0.mp4 0', 'x/../0.mp4 0']], ids=len)
@pytest.mark.parametrize('part', ['train','val'])
def test_R38_a_line_written_twice_is_counted(tmp, part, again):
    "As two names for one video are: a warning; the video counts once. With another label it is an error"
    folder = tmp/f'twice {part} {len(again)} {len(again[0])}'
    folder.mkdir()
    names = {o: [f'{o}{i}.mp4' for i in (0,1)] for o in ('train','val')}
    for i,o in enumerate((*names['train'], *names['val'])): write(folder/o, 20, start=i)
    again = [o.replace('0.mp4', f'{part}0.mp4').replace('1.mp4', f'{part}1.mp4') for o in again]
    for o,(a,b) in names.items():
        (folder/f'{o}.csv').write_text('\n'.join([f'{a} 0', f'{b} 1', *(again if o==part else [])]))
    d,said = quiet(lambda: dls(folder, bs=2))
    name,first = again[0].split()[0].strip('"'),int(again[0][-1])+1
    more = f' (and {len(again)-1} more such lines)' if again[1:] else ''
    assert said==[f"{folder/f'{part}.csv'}, line 3: {name!r} is already in line {first}{more}: it counts once"]
    assert len(d.train_ds)==len(d.valid_ds)==2
    with (folder/f'{part}.csv').open('a') as f: f.write(f'\n{part}1.mp4 0')
    with pytest.raises(ValueError, match=f"'{part}1.mp4' is already in line 2, with another label"): dls(folder, bs=2)

@pytest.mark.parametrize('how', ['same line','symlink','hard link'])
def test_R38_videos_in_both_lists(tmp, how):
    "An error, whatever the names, or a warning if asked for; two names for one video in one list are counted"
    folder = tmp/f'shared {how}'
    folder.mkdir()
    for i in range(4): write(folder/f'{i}.mp4', 20, start=i)
    if how=='symlink': (folder/'x.mp4').symlink_to(folder/'1.mp4')
    if how=='hard link': os.link(folder/'1.mp4', folder/'x.mp4')
    twin = '1.mp4' if how=='same line' else 'x.mp4'
    (folder/'train.csv').write_text('0.mp4 0\n1.mp4 1\n')
    (folder/'val.csv').write_text(f'2.mp4 0\n{twin} 1\n')
    with pytest.raises(ValueError, match=r'allow it by allow_shared \(--allow-shared\) if that is meant') as e:
        dls(folder, bs=2)
    assert ("'train.csv' too" in str(e.value) if how=='same line' else f"{folder/'1.mp4'} and {folder/'x.mp4'} are one "
            f"and the same file, in training and held out" in str(e.value))
    d,said = quiet(lambda: dls(folder, bs=2, allow_shared=True))
    assert len(d.train_ds)==len(d.valid_ds)==2 and len(said)==1
    assert said[0].endswith('are one and the same file, in training and held out')
    if how=='same line':
        (folder/'val.csv').write_text('2.mp4 1\n1.mp4 0\n')
        with pytest.raises(ValueError, match="'.*1.mp4' has another label in 'train.csv'"):
            dls(folder, bs=2, allow_shared=True)
    else:
        (folder/'train.csv').write_text('0.mp4 0\n1.mp4 1\nx.mp4 1')
        (folder/'val.csv').write_text('2.mp4 0\n3.mp4 1\n')
        d,said = quiet(lambda: dls(folder, bs=2))
        assert len(d.train_ds)==3 and said==[f"{folder/'1.mp4'} and {folder/'x.mp4'} are one and the same file"]

def test_R38_class_folders_of_videos(tmp):
    "Tests of a model take class folders of videos too: the same endings as everywhere, and what is left out is counted"
    class Clips:
        num_classes,num_frames,pretrained_cfg = 2,4,None
    for k in range(2):
        (tmp/'classes'/f'c{k}').mkdir(parents=True)
        for name in ('a.mp4','._a.mp4','.DS_Store','b.GIF','c.MOV'): (tmp/'classes'/f'c{k}'/name).write_bytes(b'x')
    (tmp/'classes'/'__MACOSX').mkdir()
    items,said = quiet(lambda: folder_items(tmp/'classes', Clips()))
    assert [(Path(p).name, i) for p,i in items]==[('a.mp4',0),('c.MOV',0),('a.mp4',1),('c.MOV',1)]
    assert len(said)==1
    assert ': 6 files are left out, being none of .3gp, .avi, .flv and such: 4 hidden, 2 .gif (as ' in said[0]

def test_class_folders_of_videos_for_training(tmp):
    "Without lists, a folder for each class: the same batches as from lists of the same files"
    for name in ('slow','fast'):
        (tmp/'sorted'/name).mkdir(parents=True)
        for i in range(4): write(tmp/'sorted'/name/f'{i}.mp4', 20+i)
    train,held,vocab = clip_files(tmp/'sorted', seed=2)
    assert (len(train), len(held), vocab) == (6, 2, ['fast','slow'])
    x,y = dls(tmp/'sorted', bs=2, seed=2).valid.one_batch()
    assert [vocab[i] for i in y] == ['fast','slow'] and x.shape[:3] == (2,3,4)

AUG = dict(rand_aug='rand-m7-n4-mstd0.5-inc1', erase=.5)
def test_R40_batches_depend_on_seed_and_list_alone(data):
    """Bit for bit the same at 0, 1 and 2 workers, two epochs, whatever the global generators do; from the middle of
    an epoch; and shared out to two processes"""
    def loader(workers=0, seed=3, bs=4, **kw):
        return dls(data, tfm=None, aug=AUG, repeats=2, workers=workers, seed=seed, bs=bs, **kw).train
    dl = loader()
    first = [batches(dl), batches(dl)]
    assert [o[0].shape for o in first[0]]==[(8,3,4,48,64)]*3 and not same(*first)
    for w in (1,2):
        random.seed(w); np.random.seed(w); torch.manual_seed(w)
        dl = loader(w)
        dl.one_batch()
        assert same(batches(dl), first[0]) and same(batches(dl), first[1])
        dl = loader(w)
        dl.set_epoch(1, batch=2)
        assert same(batches(dl), first[1][2:])
    assert not same(batches(loader(seed=4)), first[0])
    halves = [batches(loader(bs=2, rank=r, world=2)) for r in (0,1)]
    assert same([tuple(map(torch.cat, zip(*b))) for b in zip(*halves)], first[0])
    assert same(batches(dls(data).valid), batches(dls(data, workers=2).valid))

def test_R40_loading_leaves_the_global_generators_alone(data):
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    want = random.random(),np.random.rand(),torch.rand(1).item()
    dl = dls(data, tfm=None, aug=AUG).train   # fastai draws a number when a loader is made
    random.seed(1); np.random.seed(1); torch.manual_seed(1)
    batches(dl)
    assert (random.random(),np.random.rand(),torch.rand(1).item())==want

# ---------------------------------------------------------------- moving digits

@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='writers are forked')
def test_moving_digits_written_once_and_whole(tmp, monkeypatch):
    "A kill while writing leaves nothing that looks like the data; two writers at once agree"
    few = [o[:400] for o in digits()]
    monkeypatch.setattr(sys.modules['revvit.data.moving_digits'], 'digits', lambda: few)
    target = tmp/'moving'
    def start():
        p = multiprocessing.get_context('fork').Process(target=moving_digits, args=(target,))
        p.start()
        return p
    def written(): return len(list(tmp.glob('.moving_digits*/new/*/*.mp4')))
    p = start()
    while written()<20: time.sleep(.01)
    p.kill(); p.join()
    assert not target.exists()
    both = [start(), start()]
    for p in both: p.join(120)
    assert [p.exitcode for p in both]==[0,0]
    train,held,vocab = clip_files(target)
    assert (len(train), len(held), vocab)==(40, 360, directions) and len(list(target.rglob('*.mp4')))==400
    assert moving_digits_dls(bs=8, folder=target, device='cpu').train.one_batch()[0].shape==(8,3,8,32,32)
    before = {o: o.stat().st_mtime_ns for o in target.rglob('*')}
    assert moving_digits(target)==target and before=={o: o.stat().st_mtime_ns for o in target.rglob('*')}

def test_each_direction_is_as_frequent_and_colours_are_normalised(tmp):
    folder = moving_digits(tmp/'all moving')
    train,held,_ = clip_files(folder)
    assert [sorted(set(np.bincount(list(o.values())))) for o in (train,held)]==[[179,180],[45]]
    dl = moving_digits_dls(folder=folder, device='cpu').train
    dl.set_epoch(0, len(dl)-15)
    x = torch.cat([x.as_subclass(torch.Tensor) for x,_ in dl])   # 480 of the 1,437
    assert abs(x.mean())<.03 and abs(x.std()-1)<.03
    with pytest.raises(ValueError, match='train: holds other things than the moving digits'):
        moving_digits(folder/'train')
