# A client with Mojolicious: `client.pl URL OFFER`; OFFER is 1 for compression. Input and output are as for client.mjs.

use strict;
use warnings;
use MIME::Base64 qw(decode_base64 encode_base64);
use Mojo::IOLoop;
use Mojo::JSON qw(decode_json encode_json);
use Mojo::UserAgent;
use Mojo::Util qw(decode encode);

my ($url, $offer) = @ARGV;
my $conversation = decode_json(do { local $/; readline STDIN });
my %result = (echoes => [], code => 1006, wasClean => 0);

sub send_next {
  my $socket = shift;
  my $pieces = shift @$conversation or return $socket->finish(1000, 'done');
  my $kind   = exists $pieces->[0]{text} ? 'text' : 'base64';
  my $whole  = join '', map { $kind eq 'text' ? encode('UTF-8', $_->{text}) : decode_base64 $_->{base64} } @$pieces;
  $socket->send({$kind eq 'text' ? 'text' : 'binary' => $whole});
}

sub keep {
  my ($socket, %echo) = @_;
  push @{$result{echoes}}, \%echo;
  send_next $socket;
}

my $agent  = Mojo::UserAgent->new;
my $fields = $offer ? {'Sec-WebSocket-Extensions' => 'permessage-deflate'} : {};
$agent->websocket($url => $fields => sub {
  my (undef, $socket) = @_;
  die "no handshake\n" unless $socket->is_websocket;
  $socket->max_websocket_size(1 << 24);
  $socket->on(text   => sub { keep $_[0], text   => decode('UTF-8', $_[1]) });
  $socket->on(binary => sub { keep $_[0], base64 => encode_base64($_[1], '') });
  $socket->on(finish => sub { @result{qw(code wasClean)} = ($_[1], $_[1] != 1006); Mojo::IOLoop->stop });
  send_next $socket;
});
Mojo::IOLoop->start;
print encode_json \%result;
