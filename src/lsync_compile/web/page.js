() => {
  // The two clips of a result play, stop and jump together. Media events do not bubble, but they
  // can be caught on their way down.
  const other = (video) => {
    const pair = video.closest("#pair");
    return pair && [...pair.querySelectorAll("video")].find((each) => each !== video);
  };
  const together = (act) => (event) => {
    const video = event.target;
    const beside = video instanceof HTMLVideoElement && other(video);
    if (beside) act(video, beside);
  };
  const align = (video, beside) => {
    if (Math.abs(beside.currentTime - video.currentTime) > 0.06) {
      beside.currentTime = video.currentTime;
    }
  };
  document.addEventListener("play", together((video, beside) => {
    align(video, beside);
    if (beside.paused) beside.play().catch(() => {});
  }), true);
  document.addEventListener("pause", together((video, beside) => {
    if (!beside.paused && !video.ended) beside.pause();
  }), true);
  // The one with the sound leads.
  document.addEventListener("timeupdate", together((video, beside) => {
    if (!video.paused && video.closest("#after")) align(video, beside);
  }), true);
  document.addEventListener("seeked", together(align), true);
}
